"""The second stage: one program a group adds up what the programs of the first found, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sam_kernels.backends.triton.per_sample._launch import launch

__all__ = ["finish"]

_BLOCK = 256  # sums at a time: more than most layers have tiles


@triton.jit(do_not_specialize=["count"])
def _finish_kernel(
    square_norms,  # (M,) float64
    partials,  # (M, count) float32
    count,
    BLOCK_SIZE: tl.constexpr,
):
    group = tl.program_id(0)
    mine = partials + group.to(tl.int64) * count
    slots = tl.arange(0, BLOCK_SIZE)
    # float64: a group has thousands of elements here at most, and the sum stays finite where a tile's does.
    sums = tl.zeros([BLOCK_SIZE], tl.float64)
    for block in range(0, count, BLOCK_SIZE):
        sums += tl.load(mine + block + slots, mask=block + slots < count, other=0.0).to(tl.float64)
    tl.store(square_norms + group, tl.load(square_norms + group) + tl.sum(sums))


def finish(square_norms: Tensor, partials: Tensor) -> None:
    """Adds each row of ``partials`` (M, count) to its ``square_norms``."""
    m, count = partials.shape
    launch(_finish_kernel, m, partials.device, square_norms, partials, count, BLOCK_SIZE=_BLOCK)
