"""Where an update's new weights go: to the parameter, rounded to nearest or stochastically, and with ``TO_OLD`` to its master too."""

from __future__ import annotations

import triton
import triton.language as tl

from sam_kernels.backends.triton._blocks import convert, is_finite, store
from sam_kernels.backends.triton._config import CONFIGS
from sam_kernels.backends.triton._table import LaunchGroup

__all__ = ["block_of", "stochastic_bfloat16", "store_weights"]


@triton.jit
def stochastic_bfloat16(value, word):
    """Random bits below the last one that is kept, then truncated: the expectation of what is stored is the value."""
    bits = (value.to(tl.uint32, bitcast=True) + (word >> 16)) >> 16
    moved = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where(is_finite(value), moved, convert(value, tl.bfloat16))


@triton.jit
def store_weights(
    param, old_param, offsets, count, weights, word, TO_OLD: tl.constexpr, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    if TO_OLD:
        store(old_param, offsets, count, weights, MASKED)
    if STOCHASTIC:
        weights = stochastic_bfloat16(weights, word)
    store(param, offsets, count, weights, MASKED)


def block_of(group: LaunchGroup, kernel: str, is_stochastic: bool) -> int:
    """Elements a block of an update. Only rows that are rounded stochastically need blocks of whole random tiles, which their table has."""
    if is_stochastic:
        return group.constants["BLOCK_SIZE"]
    config = CONFIGS[kernel]
    return config.block if len({dtype.primitive_bitwidth for dtype in group.dtypes.values()}) == 1 else config.mixed_block
