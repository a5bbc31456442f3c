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
from sam_kernels.backends.triton._blocks import convert, load_float, operand, store
from sam_kernels.backends.triton._finish import NOT_LAST, finish
from sam_kernels.backends.triton._launch import launch, written
from sam_kernels.backends.triton._slices import ALIGNED_ELEMENTS
from sam_kernels.backends.triton._squares import add_squares, join_kinds
from sam_kernels.backends.triton._table import table_of
from sam_kernels.backends.triton.norm import launch_sums
from sam_kernels.operations import Centralize, Operands

__all__ = ["centralize_"]

_ALIGNED = tl.constexpr(ALIGNED_ELEMENTS)


@triton.jit
def _short_block(
    grad, param, first, slices, size, eta, medium, big, small,
    ADAPTIVE: tl.constexpr, SLICES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    slice_index = (first + tl.arange(0, SLICES))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    offsets = slice_index * size + column
    mask = (slice_index < slices) & (column < size)
    g = convert(tl.load(grad + offsets, mask=mask, other=0.0), tl.float32)
    mean = tl.div_rn(tl.sum(g, axis=1), tl.zeros([SLICES], tl.float32) + size.to(tl.float32))
    d = tl.where(mask, g - mean[:, None], 0.0)
    tl.store(grad + offsets, convert(d, grad.dtype.element_ty), mask=mask)
    if ADAPTIVE:
        d = (tl.abs(convert(tl.load(param + offsets, mask=mask, other=0.0), tl.float32)) + eta) * d
    return add_squares(d, medium, big, small)


@triton.jit
def _short_sums(
    grad, param, begin, end, slices, size, eta, ADAPTIVE: tl.constexpr, SLICES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    medium = tl.zeros([SLICES, COLUMNS], tl.float32)
    big = tl.zeros([SLICES, COLUMNS], tl.float32)
    small = tl.zeros([SLICES, COLUMNS], tl.float32)
    for first in range(begin, end, SLICES):
        medium, big, small = _short_block(grad, param, first, slices, size, eta, medium, big, small, ADAPTIVE, SLICES, COLUMNS)
    return tl.sum(medium), tl.sum(big), tl.sum(small)


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
    GRAD: tl.constexpr,
    PARAM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    program = tl.program_id(0)
    row = tl.load(work_rows + program)
    size = tl.load(slice_sizes + row).to(tl.int32)
    most = chunk_size // size
    start = tl.load(work_chunks + program).to(tl.int64) * (most * size)
    slices = (tl.minimum(tl.load(numels + row) - start, most * size) // size).to(tl.int32)
    addresses, grad, aligned_grad = operand(grad_pointers, row, start, GRAD)
    param, aligned_param = grad, aligned_grad
    ADAPTIVE: tl.constexpr = param_pointers is not None
    if ADAPTIVE:
        param_address, param, aligned_param = operand(param_pointers, row, start, PARAM)
        addresses = addresses | param_address
    SLICES: tl.constexpr = BLOCK_SIZE // COLUMNS
    full = tl.where(((addresses & 15) == 0) & (size % _ALIGNED == 0), slices, 0)
    HALF: tl.constexpr = SLICES // 2  # of blocks that lie askew: see _blocks.py
    multiple = size // _ALIGNED * _ALIGNED  # known to be one: neighbours share a mask then, and an access
    medium, big, small = _short_sums(aligned_grad, aligned_param, 0, full, slices, multiple, eta, ADAPTIVE, SLICES, COLUMNS)
    medium_rest, big_rest, small_rest = _short_sums(grad, param, full, slices, slices, size, eta, ADAPTIVE, HALF, COLUMNS)
    total, kind = join_kinds(medium + medium_rest, big + big_rest, small + small_rest)
    slot = tl.load(work_slots + tl.program_id(0))
    tl.store(sums + slot, total)
    tl.store(kinds + slot, kind)


@triton.jit
def _sum_part(grad, begin, end, count, BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr):
    offsets = tl.arange(0, BLOCK_SIZE)
    sums = tl.zeros([BLOCK_SIZE], tl.float32)
    for block in range(begin, end, BLOCK_SIZE):
        sums += load_float(grad, block + offsets, count, MASKED)
    return tl.sum(sums)


@triton.jit
def _finish_part(
    grad, param, begin, end, count, mean, eta, ADAPTIVE: tl.constexpr, BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    offsets = tl.arange(0, BLOCK_SIZE)
    medium = tl.zeros([BLOCK_SIZE], tl.float32)
    big = tl.zeros([BLOCK_SIZE], tl.float32)
    small = tl.zeros([BLOCK_SIZE], tl.float32)
    for block in range(begin, end, BLOCK_SIZE):
        d = load_float(grad, block + offsets, count, MASKED) - mean
        if MASKED:
            d = tl.where(block + offsets < count, d, 0.0)
        store(grad, block + offsets, count, d, MASKED)
        if ADAPTIVE:
            d = (tl.abs(load_float(param, block + offsets, count, MASKED)) + eta) * d
        medium, big, small = add_squares(d, medium, big, small)
    return tl.sum(medium), tl.sum(big), tl.sum(small)


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
    GRAD: tl.constexpr,
    PARAM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    program = tl.program_id(0)
    row = tl.load(work_rows + program)
    size = tl.load(slice_sizes + row)
    start = tl.load(work_chunks + program).to(tl.int64) * size
    addresses, grad, aligned_grad = operand(grad_pointers, row, start, GRAD)
    param, aligned_param = grad, aligned_grad
    ADAPTIVE: tl.constexpr = param_pointers is not None
    if ADAPTIVE:
        param_address, param, aligned_param = operand(param_pointers, row, start, PARAM)
        addresses = addresses | param_address
    full = tl.where(((addresses & 15) == 0) & (size % _ALIGNED == 0), size // BLOCK_SIZE * BLOCK_SIZE, 0)
    HALF: tl.constexpr = BLOCK_SIZE // 2  # of the masked blocks: see _blocks.py
    mean = _sum_part(aligned_grad, 0, full, size, BLOCK_SIZE, False) + _sum_part(grad, full, size, size, HALF, True)
    mean = tl.div_rn(mean, size.to(tl.float32))
    medium, big, small = _finish_part(aligned_grad, aligned_param, 0, full, size, mean, eta, ADAPTIVE, BLOCK_SIZE, False)
    medium_rest, big_rest, small_rest = _finish_part(grad, param, full, size, size, mean, eta, ADAPTIVE, HALF, True)
    total, kind = join_kinds(medium + medium_rest, big + big_rest, small + small_rest)
    slot = tl.load(work_slots + tl.program_id(0))
    tl.store(sums + slot, total)
    tl.store(kinds + slot, kind)


def centralize_(op: Centralize, lists: Operands) -> Tensor:  # () float32
    """See :func:`sam_kernels.functional.centralize_`."""
    written(lists["grads"])
    table = table_of(lists, "centralize", tuple(slice_sizes(lists["grads"])))
    for group in table.groups:
        if group.columns == 0:
            launch_sums(table, group, op.eta, NOT_LAST)
            continue
        kernel, width = (_long_slices_kernel, {}) if group.columns is None else (_short_slices_kernel, {"COLUMNS": group.columns})
        launch(
            kernel,
            group.chunks,
            table.device,
            *table.arguments(group, "grads", "params"),
            table.slice_sizes,
            group.slots,
            *table.sums,
            op.eta,
            GRAD=group.dtypes["grads"],
            PARAM=group.dtypes["params"],
            **width,
            **group.constants,
        )
    norm = torch.empty(1, dtype=torch.float32, device=table.device)
    finish(table, (table.count,), norm, op.found_inf, None)
    return norm[0]
