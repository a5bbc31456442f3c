"""The random perturbation: old_p <- p, p <- p + scale z, with z made on the fly and never stored.

Specification: ``sam_kernels.reference.random_perturb_``; twin: ``csrc/cpu/random.cpp``, with the same bits (``_random.py``). float32,
bfloat16 and float16 storage in any mix, float32 arithmetic, one rounding.
Reads p; writes old_p, p: 3 N s bytes (from_old: reads old_p; writes p: 2 N s).
"""

from __future__ import annotations

import triton
import triton.language as tl

from sam_kernels.backends.triton._blocks import convert, for_blocks, load, load_number, store, take_chunk
from sam_kernels.backends.triton._launch import written
from sam_kernels.backends.triton._random import PERTURBATION_STREAM, normal_pair, rademacher, seed_key, tile_offsets, tile_words
from sam_kernels.backends.triton._table import table_of
from sam_kernels.operations import Operands, RandomPerturb

__all__ = ["random_perturb_"]


@triton.jit
def _move(param, old_param, offsets, count, z, scale, FROM_OLD: tl.constexpr, MASKED: tl.constexpr):
    if FROM_OLD:
        stored = load(old_param, offsets, count, MASKED)
    else:
        stored = load(param, offsets, count, MASKED)
        store(old_param, offsets, count, stored, MASKED)
    store(param, offsets, count, convert(stored, tl.float32) + z * scale, MASKED)


@triton.jit
def _move_block(
    param, old_param, block, count, start, row, key_low, key_high, scale,
    NORMAL: tl.constexpr, FROM_OLD: tl.constexpr, BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    LANES: tl.constexpr = BLOCK_SIZE // 4
    a, b, c, d = tile_words(start + block, row, key_low, key_high, PERTURBATION_STREAM, LANES)
    if NORMAL:
        z0, z1 = normal_pair(a, b)
        z2, z3 = normal_pair(c, d)
    else:
        z0, z1, z2, z3 = rademacher(a), rademacher(b), rademacher(c), rademacher(d)
    _move(param, old_param, block + tile_offsets(0, LANES), count, z0, scale, FROM_OLD, MASKED)
    _move(param, old_param, block + tile_offsets(1, LANES), count, z1, scale, FROM_OLD, MASKED)
    _move(param, old_param, block + tile_offsets(2, LANES), count, z2, scale, FROM_OLD, MASKED)
    _move(param, old_param, block + tile_offsets(3, LANES), count, z3, scale, FROM_OLD, MASKED)


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _random_kernel(
    param_pointers,  # (R,) int64
    old_param_pointers,  # (R,) int64
    numels,  # (R,) int64
    work_rows,  # (C,) int32
    work_chunks,  # (C,) int32
    chunk_size,  # elements
    row_indices,  # (R,) int32: the caller's numbers of the rows, None where they are the same
    key_low,
    key_high,
    scale,  # number or () floating point
    DTYPES: tl.constexpr,
    NORMAL: tl.constexpr,
    FROM_OLD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row, start, count, full, plain, aligned = take_chunk(
        (param_pointers, old_param_pointers), numels, work_rows, work_chunks, chunk_size, DTYPES, BLOCK_SIZE
    )
    index = row if row_indices is None else tl.load(row_indices + row)
    factor = load_number(scale).to(tl.float32)
    for_blocks(
        _move_block, plain, aligned, full, count, (start, index, key_low, key_high, factor, NORMAL, FROM_OLD), BLOCK_SIZE
    )  # fmt: skip


def random_perturb_(op: RandomPerturb, lists: Operands) -> None:
    """See :func:`sam_kernels.functional.random_perturb_`."""
    table = table_of(lists, "random")
    for group in table.groups:
        table.launch(
            _random_kernel,
            group,
            ("params", "old_params"),
            table.row_indices(lists.indices),
            *seed_key(op.seed),
            op.scale,
            NORMAL=op.distribution == "normal",
            FROM_OLD=op.from_old,
        )
    written(lists["params"])
