"""Where an update's new weights go: to the parameter, rounded to nearest or stochastically, and with ``TO_OLD`` to its master too."""

from __future__ import annotations

import triton
import triton.language as tl

from sam_kernels.backends.triton._blocks import convert, is_finite, store
from sam_kernels.backends.triton._config import CONFIGS
from sam_kernels.backends.triton._random import ROUNDING_STREAM, tile_offsets, tile_words
from sam_kernels.backends.triton._table import LaunchGroup

__all__ = ["block_of", "for_words", "stochastic_bfloat16", "store_weights"]


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


@triton.jit
def for_words(
    BODY: tl.constexpr, tensors, block, count, start, row, key_low, key_high, options,
    STOCHASTIC: tl.constexpr, BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Calls ``BODY(*tensors, offsets, count, word, *options, STOCHASTIC, MASKED)`` for a block: once without random words (``word`` is
    None), or for the elements of each of the four words of their counters."""
    if STOCHASTIC:
        LANES: tl.constexpr = BLOCK_SIZE // 4
        words = tile_words(start + block, row, key_low, key_high, ROUNDING_STREAM, LANES)
        for word in tl.static_range(4):
            BODY(*tensors, block + tile_offsets(word, LANES), count, words[word], *options, True, MASKED)
    else:
        BODY(*tensors, block + tl.arange(0, BLOCK_SIZE), count, None, *options, False, MASKED)


def block_of(group: LaunchGroup, kernel: str, is_stochastic: bool) -> int:
    """Elements a block of an update. Only rows that are rounded stochastically need blocks of whole random tiles, which their table has."""
    if is_stochastic:
        return group.constants["BLOCK_SIZE"]
    config = CONFIGS[kernel]
    return config.block if len({dtype.primitive_bitwidth for dtype in group.dtypes.values()}) == 1 else config.mixed_block
