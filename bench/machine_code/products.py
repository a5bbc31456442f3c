"""The kernels of gradient norms per sample: their variants, recorded from calls, and what NVIDIA's processors make of them."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.machine_code import _ptx
from bench.machine_code.compiled import build
from bench.machine_code.launches import Variant, records_of
from bench.machine_code.targets import TARGETS, Target
from sam_kernels.functional import per_sample

__all__ = ["MAIN", "NVIDIA", "Product", "calls", "compile_product", "compile_products", "few", "recorded", "work_of"]

NVIDIA = ("sm_80", "sm_90", "sm_100")
MAIN = "sm_90"  # the one that every variant is compiled for
_KINDS = {  # dtypes of both operands, precision
    "bf16": (torch.bfloat16, torch.bfloat16, "ieee"),
    "fp16": (torch.float16, torch.float16, "ieee"),
    "tf32": (torch.float32, torch.float32, "tf32"),
    "fp32 as bf16": (torch.float32, torch.float32, "bf16"),
    "ieee": (torch.float32, torch.float32, "ieee"),
    "mixed": (torch.float32, torch.bfloat16, "tf32"),
}
_ASYNC = re.compile(r"cp\.async\.c[ag]\.shared\.global\s+\[[^;]*?,\s*(0x[0-9a-f]+|\d+)")
_MATRIX = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)([\w.:]*)")


@dataclass(frozen=True)
class Product:
    """What is known about the code of one variant on one target."""

    variant: Variant
    target: Target
    copies: Counter[int]  # bits of an access that goes from global memory straight to shared memory -> how many
    accesses: Counter[tuple[str, bool, int]]  # the others, as _ptx.accesses has them
    matrix: Counter[str]  # instructions of the tensor cores, with their types
    multiplications: int  # FFMA in the machine code
    doubles: int
    local: int  # bytes a thread: stack and spilled registers
    registers: int
    shared: int  # bytes a block

    @property
    def threads(self) -> int:
        return 32 * self.variant.num_warps

    @property
    def resident_threads(self) -> int:
        return self.target.resident_threads(self.registers, self.shared, self.threads)

    @property
    def constants(self) -> dict[str, object]:
        return dict(self.variant.constants)

    @property
    def kinds(self) -> list[str]:
        """What its products are made of; nothing for a kernel that has none."""
        return [str(value) for name, value in self.variant.constants if name.endswith("KIND")]

    @property
    def tile(self) -> str:
        found = self.constants
        sides = [str(found[name]) for name in ("BLOCK_P", "BLOCK_D", "BLOCK_T", "BLOCK_S", "BLOCK_C", "BLOCK_L", "ROWS") if name in found]
        return "×".join(sides * 2 if "BLOCK_T" in found else sides) or "–"


def _linear(dtypes: tuple[torch.dtype, torch.dtype, str], m: int, tokens: int, size: int, method: str) -> Callable[[], object]:
    first, second, precision = dtypes
    norms = torch.zeros(m, dtype=torch.float64)
    products = torch.empty((m, size, size)) if method == "products" else None

    def call() -> None:
        a, g = torch.zeros((m, tokens, size), dtype=first), torch.zeros((m, tokens, size), dtype=second)
        chosen = "direct" if method == "products" else method
        per_sample.linear_square_norms_(norms, a, g, products, method=chosen, precision=precision)

    return call


def calls() -> Iterator[Callable[[], object]]:
    """Every kind of product in its largest tile, in a middle one and in one for few positions; every other kernel with every dtype."""
    for kind in _KINDS.values():
        yield _linear(kind, 8, 1024, 256, "gram")
        yield _linear(kind, 2, 16, 256, "gram")
        yield _linear(kind, 16, 64, 768, "direct")
        yield _linear(kind, 2, 64, 256, "products")
        yield _linear(kind, 2, 1, 2048, "gram")
    yield _linear(_KINDS["bf16"], 2, 100, 256, "gram")
    for dtype, other in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)):
        for shape in ((2, 600, 128, 1), (2, 4, 32, 256)):
            yield lambda shape=shape, dtype=dtype, other=other: per_sample.affine_grads_(
                *torch.zeros(2, shape[0], shape[2]).unbind(), torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=other)
            )
        for padding in (None, 2):
            yield lambda dtype=dtype, padding=padding: per_sample.embedding_square_norms_(
                torch.zeros(2, dtype=torch.float64), torch.zeros(2, 8, dtype=torch.int64), _ones(2, 8, 1024, dtype), padding_idx=padding
            )


def _ones(m: int, tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.ones((m, tokens, dim), dtype=dtype)


def recorded() -> list[Variant]:
    return records_of(*calls())


def few(variants: Sequence[Variant]) -> list[Variant]:
    """The first of every kernel with every kind of product: the largest tiles, where registers and shared memory are scarce."""
    found: dict[tuple[str, ...], Variant] = {}
    for variant in variants:
        kinds = [str(value) for name, value in variant.constants if name.endswith("KIND")]
        operands = [kind for name, kind in variant.signature if name in ("inputs", "grads")]
        found.setdefault((variant.kernel, *kinds, *(operands if kinds else ())), variant)
    return list(found.values())


def compile_product(variant: Variant, target: Target) -> Product:
    """Compiles afresh, in this process."""
    compiled = build(variant, target)
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    used, sass = _ptx.resources(cubin), _ptx.machine_code(cubin)
    return Product(
        variant,
        target,
        Counter(8 * int(size, 0) for size in _ASYNC.findall(ptx)),
        _ptx.accesses(ptx),
        Counter(name + types for name, types in _MATRIX.findall(ptx)),
        len(re.findall(r"\bFFMA2?\b", sass)),
        _ptx.doubles(ptx),
        used["STACK"] + used["LOCAL"],
        used["REG"],
        compiled.metadata.shared,
    )


def _compile(work: tuple[Variant, str]) -> Product:
    return compile_product(work[0], TARGETS[work[1]])


def work_of(variants: Sequence[Variant], targets: Iterable[str] = NVIDIA) -> list[tuple[Variant, str]]:
    return list(itertools.chain(*([(v, name) for v in (variants if name == MAIN else few(variants))] for name in targets)))


def compile_products(variants: Sequence[Variant], targets: Iterable[str] = NVIDIA) -> list[Product]:
    """All on the main target, a few on the others; in a process for each processor of this machine."""
    work = work_of(variants, targets)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_compile, work, chunksize=4))
