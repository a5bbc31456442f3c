"""Inner products of two lists: sums of l^2, l d and d^2 with d = r - o, or d = r.

Specification: ``sam_kernels.reference.grad_dots``; twin: ``csrc/cpu/grad_dots.cpp``. float32, bfloat16 and float16 storage in any mix.
Three float32 sums a chunk in a fixed order without atomics; then one program adds those up in float64, which the result is in.
Reads l, r (and o): 2 N s bytes (3 N s).

As in ``norm.py`` a chunk whose |l|^2 or |d|^2 leaves [2^-100, 2^100] is read again, each of the two scaled by a power of two of its own.
The sum of products is then no larger than the larger of theirs (Cauchy and Schwarz): only what float32 cannot hold, an r - o, is infinite.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sam_kernels.backends.triton._blocks import load_float, take_chunk
from sam_kernels.backends.triton._config import FINISH_DOTS_BLOCK
from sam_kernels.backends.triton._finish import GROW, GROWN, HIGH, IN_RANGE, LOW, SHRINK, SHRUNK
from sam_kernels.backends.triton._launch import launch
from sam_kernels.backends.triton._sums import sum_chunk
from sam_kernels.backends.triton._table import table_of
from sam_kernels.operations import GradDots, Operands

__all__ = ["grad_dots"]


@triton.jit
def _dots_block(
    left, right, origin, offsets, count, left_factor, right_factor,
    HAS_ORIGIN: tl.constexpr, SCALED: tl.constexpr, sums, MASKED: tl.constexpr,
):  # fmt: skip
    squares, products, others = sums
    a = load_float(left, offsets, count, MASKED)
    b = load_float(right, offsets, count, MASKED)
    if HAS_ORIGIN:
        b = b - load_float(origin, offsets, count, MASKED)
    if SCALED:
        a, b = a * left_factor, b * right_factor
    return tl.fma(a, a, squares), tl.fma(a, b, products), tl.fma(b, b, others)


@triton.jit
def _kind_of(square):
    return tl.where(square >= HIGH, SHRUNK, tl.where(square < LOW, GROWN, IN_RANGE))


@triton.jit
def _factor_of(kind):
    return tl.where(kind == GROWN, GROW, tl.where(kind == SHRUNK, SHRINK, 1.0))


@triton.jit
def _dots_kernel(
    left_pointers,  # (R,) int64
    right_pointers,  # (R,) int64
    origin_pointers,  # (R,) int64 or None
    numels,  # (R,) int64
    work_rows,  # (C,) int32
    work_chunks,  # (C,) int32
    chunk_size,  # elements
    work_slots,  # (C,) int32
    square_sums,  # (C,) float32
    product_sums,  # (C,) float32
    other_sums,  # (C,) float32
    kinds,  # (C,) int32: how l is scaled, and 4 times how d is
    DTYPES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    HAS_ORIGIN: tl.constexpr = origin_pointers is not None
    _, _, count, full, plain, aligned = take_chunk(
        (left_pointers, right_pointers, origin_pointers), numels, work_rows, work_chunks, chunk_size, DTYPES, BLOCK_SIZE
    )
    squares, products, others = sum_chunk(_dots_block, plain, aligned, full, count, (1.0, 1.0, HAS_ORIGIN, False), BLOCK_SIZE)
    left_kind, right_kind = _kind_of(squares), _kind_of(others)
    if (left_kind != IN_RANGE) | (right_kind != IN_RANGE):
        squares, products, others = sum_chunk(
            _dots_block, plain, aligned, full, count, (_factor_of(left_kind), _factor_of(right_kind), HAS_ORIGIN, True), BLOCK_SIZE
        )
    slot = tl.load(work_slots + tl.program_id(0))
    tl.store(square_sums + slot, squares)
    tl.store(product_sums + slot, products)
    tl.store(other_sums + slot, others)
    tl.store(kinds + slot, left_kind + 4 * right_kind)


@triton.jit
def _unscaled(kind):
    """1 / factor in float64, where its square has a place."""
    return tl.where(kind == GROWN, 1.0 / GROW, tl.where(kind == SHRUNK, 1.0 / SHRINK, 1.0)).to(tl.float64)


@triton.jit
def _finish_dots_kernel(
    square_sums,  # (C,) float32
    product_sums,  # (C,) float32
    other_sums,  # (C,) float32
    kinds,  # (C,) int32
    bounds,  # (2,) int32: 0, C
    dots,  # (3,) float64
    found_inf,  # () floating point or None: set where one of the three is not finite
    BLOCK_SIZE: tl.constexpr,
):
    squares = tl.zeros([BLOCK_SIZE], tl.float64)
    products = tl.zeros([BLOCK_SIZE], tl.float64)
    others = tl.zeros([BLOCK_SIZE], tl.float64)
    end = tl.load(bounds + 1)
    for block in range(0, end, BLOCK_SIZE):
        slots = block + tl.arange(0, BLOCK_SIZE)
        is_one = slots < end
        kind = tl.load(kinds + slots, mask=is_one, other=0)
        left, right = _unscaled(kind & 3), _unscaled(kind >> 2)
        squares += tl.load(square_sums + slots, mask=is_one, other=0.0).to(tl.float64) * left * left
        products += tl.load(product_sums + slots, mask=is_one, other=0.0).to(tl.float64) * left * right
        others += tl.load(other_sums + slots, mask=is_one, other=0.0).to(tl.float64) * right * right
    square, product, other = tl.sum(squares), tl.sum(products), tl.sum(others)
    tl.store(dots, square)
    tl.store(dots + 1, product)
    tl.store(dots + 2, other)
    if found_inf is not None:
        if (square - square != 0.0) | (product - product != 0.0) | (other - other != 0.0):
            tl.store(found_inf, 1.0)


def grad_dots(op: GradDots, lists: Operands) -> Tensor:  # (3,) float64
    """See :func:`sam_kernels.functional.grad_dots`."""
    table = table_of(lists, "dots")
    for group in table.groups:
        table.launch(_dots_kernel, group, ("lefts", "rights", "origins"), group.slots, *table.dot_sums)
    dots = torch.empty(3, dtype=torch.float64, device=table.device)
    bounds = table.bounds((table.count,))
    launch(_finish_dots_kernel, 1, table.device, *table.dot_sums, bounds, dots, op.found_inf, BLOCK_SIZE=FINISH_DOTS_BLOCK)
    return dots
