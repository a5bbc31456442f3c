"""Compiled kernels that test processes share and keep between runs, by their sources, their compiler and its flags."""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from bench.machine_code import cuda
from bench.machine_code.launches import Variant
from tests.helpers.pairwise import covering_pairs
from tests.helpers.shared import ROOT, digest, digest_of_files, made_together, with_included

__all__ = ["cuda_kernels", "cuda_sources", "triton_digest", "with_every_pair"]


@cache
def _readers() -> str:
    """The modules that compile and that read the compiler's output."""
    return digest_of_files([*(ROOT / "bench" / "machine_code").glob("*.py"), ROOT / "sam_kernels" / "backends" / "triton" / "_launch.py"])


def triton_digest(*work: object, module: str, kernel: str) -> str:
    """The hash of a Triton kernel: its source and that of all it calls, as Triton's own cache has it, and ``work``."""
    import triton

    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith("TRITON_"))
    source = getattr(importlib.import_module(module), kernel).cache_key
    return digest(_readers(), triton.__version__, settings, source, *work)


def cuda_sources(source: str, root: Path = ROOT) -> list[Path]:
    """``root``/csrc/cuda/``source``.cu and every file of csrc that it includes."""
    return with_included(root / "csrc" / "cuda" / f"{source}.cu", root / "csrc")


def with_every_pair(variants: Sequence[Variant]) -> list[Variant]:
    """Variants of each kernel in which every pair of values of two constants, and of types of two arguments, occurs that occurs in all."""
    chosen: list[Variant] = []
    for kernel in dict.fromkeys(variant.kernel for variant in variants):
        own = [variant for variant in variants if variant.kernel == kernel]
        rows = [
            {**{f"{name}=": str(value) for name, value in variant.values}, **{f"{name}:": kind for name, kind in variant.signature}}
            for variant in own
        ]
        chosen += [own[i] for i in covering_pairs(rows)]
    return chosen


@cache
def _compilers() -> tuple[str, ...]:
    """The versions of nvcc and of its host compiler, with all they print, and the flags."""
    commands = [cuda.toolkit()[0]], [*shlex.split(os.environ.get("CXX") or "c++")]
    versions = [subprocess.run([*command, "--version"], capture_output=True, text=True).stdout for command in commands]
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith("NVCC_"))
    return *versions, *cuda.flags(), repr(commands), repr(settings)


def _cuda_digest(source: str, arch: str, root: Path) -> str:
    return digest(_readers(), _compilers(), source, arch, digest_of_files(cuda_sources(source, root)))


def cuda_kernels(architectures: Sequence[str], sources: Sequence[str] = cuda.SOURCES, root: Path = ROOT) -> list[cuda.Kernel]:
    """The kernels of csrc/cuda for each of these architectures: about a minute of two processors, where nothing is kept yet."""
    work = [(source, arch) for source in sources for arch in architectures]
    compiled = made_together("cuda", work, lambda item: _cuda_digest(*item, root), lambda item: cuda.compile_file(*item, root))
    return [kernel for kernels in compiled for kernel in kernels]
