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

from sam_kernels.backends.triton._blocks import is_skipped, load_float, load_number, store, take_chunk
from sam_kernels.backends.triton._finish import Finish, finish_in_last_program, launch_sums, store_sum
from sam_kernels.backends.triton._launch import single, written
from sam_kernels.backends.triton._sums import add_squares, join_kinds, sum_chunk
from sam_kernels.backends.triton._table import table_of
from sam_kernels.operations import Combine, Operands

__all__ = ["combine_"]


@triton.jit
def _combine_block(
    out, left, right, origin, offsets, count, left_weight, right_weight, origin_weight,
    HAS_ORIGIN: tl.constexpr, WRITES: tl.constexpr, sums, MASKED: tl.constexpr,
):  # fmt: skip
    value = load_float(right, offsets, count, MASKED) * right_weight
    if HAS_ORIGIN:
        value = value + load_float(origin, offsets, count, MASKED) * origin_weight
    value = load_float(left, offsets, count, MASKED) * left_weight + value
    if WRITES:
        store(out, offsets, count, value, MASKED)
    return add_squares(value, sums)


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
    DTYPES: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,  # compiled in: as an argument it would cost the registers of a block
    BLOCK_SIZE: tl.constexpr,
    FINISH_SIZE: tl.constexpr,
):
    HAS_ORIGIN: tl.constexpr = origin_pointers is not None
    _, _, count, full, plain, aligned = take_chunk(
        (out_pointers, left_pointers, right_pointers, origin_pointers), numels, work_rows, work_chunks, CHUNK_SIZE, DTYPES, BLOCK_SIZE
    )
    a, b, c = load_number(left_weight).to(tl.float32), load_number(right_weight).to(tl.float32), 0.0
    if HAS_ORIGIN:
        c = load_number(origin_weight).to(tl.float32)
    if is_skipped(None, found_inf):
        medium, big, small = sum_chunk(_combine_block, plain, aligned, full, count, (a, b, c, HAS_ORIGIN, False), BLOCK_SIZE)
    else:
        medium, big, small = sum_chunk(_combine_block, plain, aligned, full, count, (a, b, c, HAS_ORIGIN, True), BLOCK_SIZE)
    total, kind = join_kinds(medium, big, small)
    store_sum(total, kind, work_slots, sums, kinds)
    finish_in_last_program(sums, kinds, counter, bounds, norm, not_finite, skipped, FINISH_SIZE)


def combine_(op: Combine, lists: Operands) -> Tensor:  # () float32
    """See :func:`sam_kernels.functional.combine_`."""
    has_origins = "origins" in lists
    table = table_of(lists, "combine")
    norm = torch.empty(1, dtype=torch.float32, device=table.device)
    finish = Finish(table, (table.count,), norm, op.found_inf, None, folds=not has_origins)
    for group in table.groups:
        launch_sums(
            _combine_kernel,
            table,
            group,
            ("outs", "lefts", "rights", "origins"),
            finish.arguments(group),
            single(op.found_inf),
            op.left_weight,
            op.right_weight,
            op.origin_weight if has_origins else None,
            CHUNK_SIZE=table.chunk_size,
        )
    finish.launch_rest()
    written(lists["outs"])
    return norm[0]
