"""Gradients less the means of their slices, and the norm of what is left, in one pass.

Specification: ``sam_kernels.reference.centralize_``; twin: ``csrc/cpu/centralize.cpp``. float32, bfloat16 and float16 storage, float32
arithmetic, one rounding of g; sums of squares as in ``direction.py``. A mean is a float32 sum, divided: it overflows where the sum does.
Slices that fit half a block stay in registers between the mean and the difference, several of them side by side. A longer one has a
program of its own and is read twice, the second time from the caches. Tensors without slices are left to the norm's own kernel.
Reads g (and p when adaptive), writes g: 2 N s bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sam_kernels._tensor_list import slice_sizes
from sam_kernels.backends.triton._blocks import convert, load_float, load_where, operands, store
from sam_kernels.backends.triton._finish import Finish, store_sum
from sam_kernels.backends.triton._launch import written
from sam_kernels.backends.triton._slices import ALIGNED_ELEMENTS
from sam_kernels.backends.triton._sums import add_squares, join_kinds, sum_blocks, sum_chunk, weighted
from sam_kernels.backends.triton._table import table_of
from sam_kernels.backends.triton.norm import launch_norms
from sam_kernels.operations import Centralize, Operands

__all__ = ["centralize_"]

_ALIGNED = tl.constexpr(ALIGNED_ELEMENTS)


@triton.jit
def _short_block(
    grad, param, slices, count, size, eta, ADAPTIVE: tl.constexpr, COLUMNS: tl.constexpr, sums, MASKED: tl.constexpr
):  # fmt: skip
    """Slices of a block, a slice a line; ``count`` of them in all. Every access has a mask."""
    column = tl.arange(0, COLUMNS)[None, :]
    offsets = slices[:, None] * size + column
    mask = (slices[:, None] < count) & (column < size)
    g = load_where(grad, offsets, mask)
    mean = tl.div_rn(tl.sum(g, axis=1), tl.zeros_like(slices).to(tl.float32) + size.to(tl.float32))
    d = tl.where(mask, g - mean[:, None], 0.0)
    tl.store(grad + offsets, convert(d, grad.dtype.element_ty), mask=mask)
    if ADAPTIVE:
        d = (tl.abs(load_where(param, offsets, mask)) + eta) * d
    return add_squares(d, sums)


@triton.jit
def _short_slices_kernel(
    grad_pointers,  # (R,) int64
    param_pointers,  # (R,) int64, None unless adaptive
    numels,  # (R,) int64
    work_rows,  # (C,) int32
    work_chunks,  # (C,) int32
    chunk_size,  # elements
    slice_sizes,  # (R,) int64
    work_slots,  # (C,) int32
    sums,  # (C,) float32
    kinds,  # (C,) int32: how the sum is scaled
    eta,
    DTYPES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    program = tl.program_id(0)
    row = tl.load(work_rows + program)
    size = tl.load(slice_sizes + row).to(tl.int32)
    most = chunk_size // size
    start = tl.load(work_chunks + program).to(tl.int64) * (most * size)
    slices = (tl.minimum(tl.load(numels + row) - start, most * size) // size).to(tl.int32)
    addresses, plain, aligned = operands((grad_pointers, param_pointers), row, start, DTYPES)
    ADAPTIVE: tl.constexpr = param_pointers is not None
    SLICES: tl.constexpr = BLOCK_SIZE // COLUMNS
    HALF: tl.constexpr = SLICES // 2  # of blocks that lie askew: see _blocks.py
    full = tl.where(((addresses & 15) == 0) & (size % _ALIGNED == 0), slices, 0)
    multiple = size // _ALIGNED * _ALIGNED  # known to be one: neighbours share a mask then, and an access
    medium, big, small = sum_blocks(
        _short_block, aligned, 0, full, slices, (multiple, eta, ADAPTIVE, COLUMNS), (SLICES, COLUMNS), False
    )  # fmt: skip
    medium_rest, big_rest, small_rest = sum_blocks(
        _short_block, plain, full, slices, slices, (size, eta, ADAPTIVE, COLUMNS), (HALF, COLUMNS), True
    )
    total, kind = join_kinds(medium + medium_rest, big + big_rest, small + small_rest)
    store_sum(total, kind, work_slots, sums, kinds)


@triton.jit
def _sum_part(grad, begin, end, count, BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr):
    offsets = tl.arange(0, BLOCK_SIZE)
    sums = tl.zeros([BLOCK_SIZE], tl.float32)
    for block in range(begin, end, BLOCK_SIZE):
        sums += load_float(grad, block + offsets, count, MASKED)
    return tl.sum(sums)


@triton.jit
def _long_block(grad, param, offsets, count, mean, eta, ADAPTIVE: tl.constexpr, sums, MASKED: tl.constexpr):
    d = load_float(grad, offsets, count, MASKED) - mean
    if MASKED:
        d = tl.where(offsets < count, d, 0.0)
    store(grad, offsets, count, d, MASKED)
    return add_squares(weighted(d, param, offsets, count, eta, ADAPTIVE, MASKED), sums)


@triton.jit
def _long_slices_kernel(
    grad_pointers,  # (R,) int64
    param_pointers,  # (R,) int64, None unless adaptive
    numels,  # (R,) int64
    work_rows,  # (C,) int32
    work_chunks,  # (C,) int32
    chunk_size,  # elements
    slice_sizes,  # (R,) int64
    work_slots,  # (C,) int32
    sums,  # (C,) float32
    kinds,  # (C,) int32: how the sum is scaled
    eta,
    DTYPES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    program = tl.program_id(0)
    row = tl.load(work_rows + program)
    size = tl.load(slice_sizes + row)
    start = tl.load(work_chunks + program).to(tl.int64) * size
    addresses, plain, aligned = operands((grad_pointers, param_pointers), row, start, DTYPES)
    full = tl.where(((addresses & 15) == 0) & (size % _ALIGNED == 0), size // BLOCK_SIZE * BLOCK_SIZE, 0)
    HALF: tl.constexpr = BLOCK_SIZE // 2  # of the masked blocks: see _blocks.py
    mean = _sum_part(aligned[0], 0, full, size, BLOCK_SIZE, False) + _sum_part(plain[0], full, size, size, HALF, True)
    mean = tl.div_rn(mean, size.to(tl.float32))
    medium, big, small = sum_chunk(_long_block, plain, aligned, full, size, (mean, eta, param_pointers is not None), BLOCK_SIZE)
    total, kind = join_kinds(medium, big, small)
    store_sum(total, kind, work_slots, sums, kinds)


def centralize_(op: Centralize, lists: Operands) -> Tensor:  # () float32
    """See :func:`sam_kernels.functional.centralize_`."""
    written(lists["grads"])
    table = table_of(lists, "centralize", tuple(slice_sizes(lists["grads"])))
    norm = torch.empty(1, dtype=torch.float32, device=table.device)
    finish = Finish(table, (table.count,), norm, op.found_inf, None, folds=False)
    for group in table.groups:
        if group.columns == 0:
            launch_norms(table, group, op.eta, finish.arguments(group))
            continue
        kernel, width = (_long_slices_kernel, {}) if group.columns is None else (_short_slices_kernel, {"COLUMNS": group.columns})
        table.launch(kernel, group, ("grads", "params"), table.slice_sizes, group.slots, *table.sums, op.eta, **width)
    finish.launch_rest()
    return norm[0]
