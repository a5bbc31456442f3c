"""What a sweep varies of the Triton kernels: elements a chunk and a block, and warps. Each is a kernel of its own.

Compiling is most of the work: some hundred variants of a second each. Processes of their own do it first, side by side, into triton's cache
on disk; the measurement then only loads.
"""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu.sweep import KERNELS, call_of
from bench.workloads import DTYPES

__all__ = ["BACKEND", "Choice", "choices", "compile_all", "compile_share", "default_of", "reason_missing", "using"]

BACKEND = "triton"
CHUNKS = (8192, 16384, 32768)
BLOCKS = (512, 1024, 2048, 4096)
WARPS = (4, 8)
LEAST_BLOCK = {"random": 2048}  # a tile of random numbers
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Choice:
    chunk: int
    block: int
    num_warps: int

    def __str__(self) -> str:
        return f"{self.chunk // 1024}k/{self.block}/{self.num_warps}"


def _config() -> Any:
    """Imported late: without triton there is nothing to configure, and the rest of the benchmark need not know."""
    return importlib.import_module("sam_kernels.backends.triton._config")


def reason_missing() -> str | None:
    reason: str | None = importlib.import_module("sam_kernels.backends.triton").BACKEND.reason_missing
    return reason


def choices(kernel: str) -> list[Choice]:
    found = [Choice(*parts) for parts in itertools.product(CHUNKS, BLOCKS, WARPS)]
    return [choice for choice in found if LEAST_BLOCK.get(kernel, 0) <= choice.block <= choice.chunk]


def default_of(kernel: str) -> Choice:
    config = _config().CONFIGS[kernel]
    return Choice(config.chunk, config.block, config.num_warps)


def using(kernel: str, choice: Choice) -> AbstractContextManager[None]:
    """While open, the kernel's work is cut so."""
    found: AbstractContextManager[None] = _config().tuned(kernel, **asdict(choice))
    return found


def _variants(dtypes: Sequence[str]) -> list[tuple[str, str, Choice]]:
    return [(kernel, dtype, choice) for kernel in KERNELS for dtype in dtypes for choice in choices(kernel)]


def compile_share(share: int, of: int, dtypes: Sequence[str]) -> None:
    """Compiles every ``of``-th variant by running it on little."""
    for i, (kernel, dtype, choice) in enumerate(_variants(dtypes)):
        if i % of == share:
            try:
                with using(kernel, choice):
                    call_of(KERNELS[kernel], BACKEND, DTYPES[dtype], 2 * choice.chunk, "cuda")()
            except Exception as error:  # too much for a processor: the measurement says so
                print(f"{kernel} {dtype} {choice}: {type(error).__name__}")
    torch.cuda.synchronize()


def compile_all(dtypes: Sequence[str], seconds: float) -> None:
    count = max(1, min(14, (os.cpu_count() or 1) - 2))
    code = "import sys; from bench.gpu.sweep_triton import compile_share as c; c(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])"
    end = time.monotonic() + seconds
    workers = [subprocess.Popen([sys.executable, "-c", code, str(i), str(count), *dtypes], cwd=ROOT) for i in range(count)]
    for worker in workers:
        try:
            worker.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
