"""A weighted sum of two or three lists, and the norm of the result: out <- a l + (b r + c o).

Specification: ``sam_kernels.reference.combine_``; twin: ``csrc/cpu/combine.cpp``. float32, bfloat16 and float16 storage in any mix, float32
arithmetic in that order, one rounding. out may be l, r or o, so a chunk cannot be read twice: each square goes at once into the sum of its
size, as in ``direction.py``. The weights are numbers or lie in device memory. Where ``found_inf`` is set nothing is written.
Reads l, r (and o); writes out: 3 N s bytes (4 N s).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sam_kernels.backends.triton._blocks import full_blocks, is_skipped, load_float, load_number, locate, operand, store
from sam_kernels.backends.triton._config import FINISH_BLOCK
from sam_kernels.backends.triton._finish import Finish, store_sum
from sam_kernels.backends.triton._launch import launch, single, written
from sam_kernels.backends.triton._squares import add_squares, join_kinds
from sam_kernels.backends.triton._table import table_of
from sam_kernels.operations import Combine, Operands

__all__ = ["combine_"]


@triton.jit
def _combine_block(
    out, left, right, origin, offsets, count, left_weight, right_weight, origin_weight, medium, big, small,
    HAS_ORIGIN: tl.constexpr, WRITES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    value = load_float(right, offsets, count, MASKED) * right_weight
    if HAS_ORIGIN:
        value = value + load_float(origin, offsets, count, MASKED) * origin_weight
    value = load_float(left, offsets, count, MASKED) * left_weight + value
    if WRITES:
        store(out, offsets, count, value, MASKED)
    return add_squares(value, medium, big, small)


@triton.jit
def _combine_blocks(
    out, left, right, origin, begin, end, count, left_weight, right_weight, origin_weight,
    HAS_ORIGIN: tl.constexpr, WRITES: tl.constexpr, BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, BLOCK_SIZE)
    medium = tl.zeros([BLOCK_SIZE], tl.float32)
    big = tl.zeros([BLOCK_SIZE], tl.float32)
    small = tl.zeros([BLOCK_SIZE], tl.float32)
    for block in range(begin, end, BLOCK_SIZE):
        medium, big, small = _combine_block(
            out, left, right, origin, block + offsets, count, left_weight, right_weight, origin_weight, medium, big, small,
            HAS_ORIGIN, WRITES, MASKED,
        )  # fmt: skip
    return tl.sum(medium), tl.sum(big), tl.sum(small)


@triton.jit
def _combine_chunk(
    out, aligned_out, left, aligned_left, right, aligned_right, origin, aligned_origin, count, full,
    left_weight, right_weight, origin_weight,
    HAS_ORIGIN: tl.constexpr, WRITES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_SIZE // 2  # of the masked blocks: see _blocks.py
    medium, big, small = _combine_blocks(
        aligned_out, aligned_left, aligned_right, aligned_origin, 0, full, count, left_weight, right_weight, origin_weight,
        HAS_ORIGIN, WRITES, BLOCK_SIZE, False,
    )  # fmt: skip
    medium_rest, big_rest, small_rest = _combine_blocks(
        out, left, right, origin, full, count, count, left_weight, right_weight, origin_weight, HAS_ORIGIN, WRITES, HALF, True
    )
    return join_kinds(medium + medium_rest, big + big_rest, small + small_rest)


@triton.jit
def _combine_kernel(
    out_pointers,  # (R,) int64
    left_pointers,  # (R,) int64
    right_pointers,  # (R,) int64
    origin_pointers,  # (R,) int64 or None
    numels,  # (R,) int64
    work_rows,  # (C,) int32
    work_chunks,  # (C,) int32
    work_slots,  # (C,) int32
    sums,  # (C,) float32
    kinds,  # (C,) int32: how the sum is scaled
    counter,  # () int32 or None: of the last launch, whose last program makes the norm
    bounds,  # (2,) int32 or None: 0, C
    norm,  # () float32 or None
    not_finite,  # () floating point or None: set where the norm is not finite, when all programs have read found_inf
    skipped,  # None
    found_inf,  # () float32 or None
    left_weight,  # number or () floating point
    right_weight,  # number or () floating point
    origin_weight,  # number or () floating point; None without origins
    OUT: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ORIGIN: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,  # compiled in: as an argument it would cost the registers of a block
    BLOCK_SIZE: tl.constexpr,
    FINISH_SIZE: tl.constexpr,
):
    row, start, count = locate(work_rows, work_chunks, CHUNK_SIZE, numels)
    out_address, out, aligned_out = operand(out_pointers, row, start, OUT)
    left_address, left, aligned_left = operand(left_pointers, row, start, LEFT)
    right_address, right, aligned_right = operand(right_pointers, row, start, RIGHT)
    addresses = out_address | left_address | right_address
    origin, aligned_origin = right, aligned_right
    a, b, c = load_number(left_weight).to(tl.float32), load_number(right_weight).to(tl.float32), 0.0
    HAS_ORIGIN: tl.constexpr = origin_pointers is not None
    if HAS_ORIGIN:
        origin_address, origin, aligned_origin = operand(origin_pointers, row, start, ORIGIN)
        addresses = addresses | origin_address
        c = load_number(origin_weight).to(tl.float32)
    full = full_blocks(addresses, count, BLOCK_SIZE)
    if is_skipped(None, found_inf):
        total, kind = _combine_chunk(
            out, aligned_out, left, aligned_left, right, aligned_right, origin, aligned_origin, count, full, a, b, c,
            HAS_ORIGIN, False, BLOCK_SIZE,
        )  # fmt: skip
    else:
        total, kind = _combine_chunk(
            out, aligned_out, left, aligned_left, right, aligned_right, origin, aligned_origin, count, full, a, b, c,
            HAS_ORIGIN, True, BLOCK_SIZE,
        )  # fmt: skip
    slot = tl.load(work_slots + tl.program_id(0))
    store_sum(total, kind, slot, sums, kinds, counter, bounds, norm, not_finite, skipped, FINISH_SIZE)


def combine_(op: Combine, lists: Operands) -> Tensor:  # () float32
    """See :func:`sam_kernels.functional.combine_`."""
    has_origins = "origins" in lists
    table = table_of(lists, "combine")
    norm = torch.empty(1, dtype=torch.float32, device=table.device)
    finish = Finish(table, (table.count,), norm, op.found_inf, None, folds=not has_origins)
    for group in table.groups:
        launch(
            _combine_kernel,
            group.chunks,
            table.device,
            *table.arguments(group, "outs", "lefts", "rights", "origins", with_chunk_size=False),
            group.slots,
            *table.sums,
            *finish.arguments(group),
            single(op.found_inf),
            op.left_weight,
            op.right_weight,
            op.origin_weight if has_origins else None,
            OUT=group.dtypes["outs"],
            LEFT=group.dtypes["lefts"],
            RIGHT=group.dtypes["rights"],
            ORIGIN=group.dtypes["origins"],
            CHUNK_SIZE=table.chunk_size,
            FINISH_SIZE=FINISH_BLOCK,
            **group.constants,
        )
    finish.launch_rest()
    written(lists["outs"])
    return norm[0]
