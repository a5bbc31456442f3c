"""A variant compiled for a processor, and what its code says; many of them, on all processors of this machine."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bench.machine_code import _amdgcn, _ptx
from bench.machine_code._intermediate import Loop, address_violations, loops, uses_fma
from bench.machine_code.launches import Variant
from bench.machine_code.targets import TARGETS, Target
from sam_kernels.backends.triton._launch import warps_of

__all__ = ["Code", "build", "compile_all", "compile_variant"]

Widths = Counter[tuple[str, bool, int]]  # (load or store, whether under a predicate, bits a thread) -> how often


@dataclass(frozen=True)
class Code:
    """What is known about the code of one variant on one target."""

    variant: Variant
    target: Target
    loops: list[Loop]  # what the kernel asks for
    wrong_addresses: list[str]
    accesses: Widths  # what it got: PTX, or AMD's assembly
    disassembled: Widths | None  # what ptxas made of it
    registers: int
    scratch: int  # bytes of local memory a thread: stack and spilled registers
    hot_spills: int  # accesses to it inside of loops
    shared: int  # bytes a block
    doubles: int  # instructions in float64
    asks_for_fma: bool
    has_fma: bool | None  # None: AMD's sqrt and division are made of them, so that they say nothing
    loose_arithmetic: list[str]

    @property
    def threads(self) -> int:
        """Of a block."""
        return warps_of(self.variant.num_warps, self.target.warp_size) * self.target.warp_size

    @property
    def resident_threads(self) -> int:
        return self.target.resident_threads(self.registers, self.shared, self.threads)

    @property
    def full_loops(self) -> list[Loop]:
        return [loop for loop in self.loops if not loop.masked]

    @property
    def masked_loops(self) -> list[Loop]:
        return [loop for loop in self.loops if loop.masked]

    @property
    def main_loops(self) -> list[Loop]:
        """Those whose accesses are to be wide: without a mask, or over whole blocks of slices."""
        block = dict(self.variant.constants).get("BLOCK_SIZE")
        whole = [loop for loop in self.loops if all(access.elements == block for access in loop.accesses)]
        return whole if self.variant.holds_slices else self.full_loops

    @property
    def bytes_per_element(self) -> float:
        """What the busiest main loop loads and stores. (Random numbers: an operand takes several accesses a block.)"""
        block = dict(self.variant.constants)["BLOCK_SIZE"]
        return max(sum(access.bytes for access in loop.accesses) for loop in self.main_loops) / block

    def wanted(self, kind: str) -> Counter[int]:
        """Bits of an access -> bytes a thread, over all main loops, if each operand had accesses of 16 bytes, or less where a
        thread has less of it."""
        found: Counter[int] = Counter()
        for access in (access for loop in self.main_loops for access in loop.accesses if access.kind == kind):
            bytes_of_thread = access.bytes // self.threads
            found[min(8 * bytes_of_thread, 128)] += bytes_of_thread
        return found

    def got(self, kind: str) -> Counter[int]:
        """The same, of what main loops do. Wider accesses count as 16 bytes."""
        masked = self.variant.holds_slices and self.target.backend != "hip"  # where masks are branches
        found: Counter[int] = Counter()
        for (which, under, bits), n in self.accesses.items():
            if which == kind and under == masked and bits >= 64:
                found[min(bits, 128)] += n * bits // 8
        return found

    def widths(self, kind: str, *, masked: bool) -> list[int]:
        """Bits a thread of the accesses to blocks, each width once."""
        return sorted({bits for which, under, bits in self.accesses if which == kind and under == masked and (masked or bits >= 64)})


def build(variant: Variant, target: Target) -> Any:
    """What Triton made of a variant, compiled afresh in this process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    place = {name: i for i, (name, _) in enumerate(variant.signature)}
    attributes = {(place[name],): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(kernel, dict(variant.signature), {(place[name],): value for name, value in variant.constants}, attributes)
    options: dict[str, Any] = {"num_warps": warps_of(variant.num_warps, target.warp_size), "enable_fp_fusion": variant.fp_fusion}
    if variant.num_stages is not None:
        options["num_stages"] = variant.num_stages
    with _fresh_cache():
        return triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options)


def compile_variant(variant: Variant, target: Target, *, disassemble: bool = False) -> Code:
    """Compiles afresh, in this process."""
    compiled = build(variant, target)
    ttir = compiled.asm["ttir"]
    known = {
        "variant": variant,
        "target": target,
        "loops": loops(ttir),
        "wrong_addresses": address_violations(ttir) if variant.walks_chunks else [],
        "shared": compiled.metadata.shared,
        "asks_for_fma": uses_fma(ttir),
    }
    if target.backend == "hip":
        return Code(**known, **_on_amd(compiled.asm["amdgcn"]))
    return Code(**known, **_on_nvidia(compiled.asm["ptx"], compiled.asm["cubin"], disassemble))


def _on_amd(text: str) -> dict[str, Any]:
    used = _amdgcn.resources(text)
    return {
        "accesses": _amdgcn.accesses(text),
        "disassembled": None,
        "registers": used["registers"],
        "scratch": used["scratch"],
        "hot_spills": used["scratch"],
        "doubles": _amdgcn.doubles(text),
        "has_fma": None,
        "loose_arithmetic": [],
    }


def _on_nvidia(ptx: str, cubin: bytes, disassemble: bool) -> dict[str, Any]:
    used = _ptx.resources(cubin)
    scratch = used["STACK"] + used["LOCAL"]
    sass = _ptx.machine_code(cubin) if disassemble or scratch else ""
    return {
        "accesses": _ptx.accesses(ptx),
        "disassembled": _ptx.disassembled(sass) if sass else None,
        "registers": used["REG"],
        "scratch": scratch,
        "hot_spills": _ptx.spills_in_loops(sass),
        "doubles": _ptx.doubles(ptx),
        "has_fma": _ptx.uses_fma(ptx),
        "loose_arithmetic": _ptx.loose_arithmetic(ptx),
    }


@contextmanager
def _fresh_cache() -> Iterator[None]:
    """Nothing that was compiled before is found."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TRITON_CACHE_DIR"]
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


def _compile(work: tuple[Variant, str, bool]) -> Code:
    variant, target, disassemble = work
    return compile_variant(variant, TARGETS[target], disassemble=disassemble)


def compile_all(work: Iterable[tuple[Variant, str, bool]]) -> list[Code]:
    """(variant, name of a target, whether to disassemble) -> its code, in a process for each processor."""
    # New processes, not copies of this one: torch's threads do not survive a fork.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_compile, list(work), chunksize=8))
