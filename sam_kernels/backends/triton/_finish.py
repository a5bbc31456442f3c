"""The second stage of a norm: one program a norm adds up the sums of its chunks, in a fixed order, and takes the root.

A chunk's sum is of one of three kinds, so that only a norm that float32 cannot hold is infinite: as it is, of terms times SHRINK (they were
too large to be squared), or of terms times GROW (too small).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sam_kernels.backends.triton._blocks import convert, is_finite
from sam_kernels.backends.triton._config import FINISH_BLOCK
from sam_kernels.backends.triton._launch import launch
from sam_kernels.backends.triton._table import ChunkTable

__all__ = ["GROW", "GROWN", "HIGH", "IN_RANGE", "LOW", "SHRINK", "SHRUNK", "finish"]

SHRINK = tl.constexpr(2.0**-80)
GROW = tl.constexpr(2.0**100)
IN_RANGE, SHRUNK, GROWN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
HIGH, LOW = tl.constexpr(2.0**100), tl.constexpr(2.0**-100)  # a sum of squares of a chunk as it is lies between


@triton.jit
def _finish_kernel(
    sums,  # (C,) float32
    kinds,  # (C,) int32
    bounds,  # (M + 1,) int32: the sums of each norm
    norms,  # (M,) floating point
    found_inf,  # () float32 or None: set where the norm is not finite
    skipped,  # () float32 or None: what found_inf was is added to it, and found_inf starts anew
    BLOCK_SIZE: tl.constexpr,
):
    group = tl.program_id(0)
    begin, end = tl.load(bounds + group), tl.load(bounds + group + 1)
    in_range = tl.zeros([BLOCK_SIZE], tl.float32)
    shrunk = tl.zeros([BLOCK_SIZE], tl.float32)
    grown = tl.zeros([BLOCK_SIZE], tl.float32)
    for block in range(begin, end, BLOCK_SIZE):
        slots = block + tl.arange(0, BLOCK_SIZE)
        part = tl.load(sums + slots, mask=slots < end, other=0.0)
        kind = tl.load(kinds + slots, mask=slots < end, other=0)
        in_range += tl.where(kind == IN_RANGE, part, 0.0)
        shrunk += tl.where(kind == SHRUNK, part, 0.0)
        grown += tl.where(kind == GROWN, part, 0.0)
    medium, big, small = tl.sum(in_range), tl.sum(shrunk), tl.sum(grown)
    # 1 / factor, twice: its square would not fit float32.
    from_big = tl.sqrt_rn(big + medium * SHRINK * SHRINK) * (1.0 / SHRINK)
    from_medium = tl.sqrt_rn(medium + small * (1.0 / GROW) * (1.0 / GROW))
    from_small = tl.sqrt_rn(small) * (1.0 / GROW)
    norm = tl.where(big != 0.0, from_big, tl.where(medium != 0.0, from_medium, from_small))
    tl.store(norms + group, convert(norm, norms.dtype.element_ty))
    if found_inf is not None:
        finite = is_finite(norm)
        if skipped is not None:
            count = convert(tl.load(skipped), tl.float32) + convert(tl.load(found_inf), tl.float32)
            tl.store(skipped, convert(count, skipped.dtype.element_ty))
            tl.store(found_inf, tl.where(finite, 0.0, 1.0))
        elif ~finite:
            tl.store(found_inf, 1.0)


def finish(
    table: ChunkTable,
    group_sizes: tuple[int, ...],
    norms: Tensor,  # (M,)
    found_inf: Tensor | None,
    skipped: Tensor | None,
) -> None:
    """The second stage: norms of consecutive groups of rows from the sums of their chunks."""
    launch(
        _finish_kernel,
        len(group_sizes),
        table.device,
        *table.sums,
        table.bounds(group_sizes),
        norms,
        found_inf,
        skipped,
        BLOCK_SIZE=FINISH_BLOCK,
    )
