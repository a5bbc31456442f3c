"""Sums over the elements of a chunk, three at a time: the loops over its blocks, and the three sums of a norm.

Where terms are seen once, a square must not overflow or vanish: each term goes at once into the sum of its size (the kinds of
``_finish.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from sam_kernels.backends.triton._blocks import load_float
from sam_kernels.backends.triton._finish import GROW, GROWN, IN_RANGE, SHRINK, SHRUNK

__all__ = ["add_squares", "join_kinds", "sum_blocks", "sum_chunk", "weighted"]

# Squares of a chunk of terms between these add up to less than 2^100, as those of larger ones times SHRINK and smaller ones times GROW do.
_LARGE = tl.constexpr(2.0**40)
_SMALL = tl.constexpr(2.0**-56)


@triton.jit
def sum_blocks(ADD: tl.constexpr, pointers, begin, end, count, options, SHAPE: tl.constexpr, MASKED: tl.constexpr):
    """Three sums over blocks of SHAPE, the first axis of which walks from ``begin`` to ``end``.

    ``ADD(*pointers, offsets, count, *options, sums, MASKED)`` returns three blocks of sums with one block added."""
    offsets = tl.arange(0, SHAPE[0])
    sums = (tl.zeros(SHAPE, tl.float32), tl.zeros(SHAPE, tl.float32), tl.zeros(SHAPE, tl.float32))
    for block in range(begin, end, SHAPE[0]):
        sums = ADD(*pointers, block + offsets, count, *options, sums, MASKED)
    return tl.sum(sums[0]), tl.sum(sums[1]), tl.sum(sums[2])


@triton.jit
def sum_chunk(ADD: tl.constexpr, plain, aligned, full, count, options, BLOCK_SIZE: tl.constexpr):
    """Three sums over a chunk: whole blocks up to ``full``, half ones under a mask from there on (see ``_blocks.py``)."""
    HALF: tl.constexpr = BLOCK_SIZE // 2
    first, second, third = sum_blocks(ADD, aligned, 0, full, count, options, (BLOCK_SIZE,), False)
    first_rest, second_rest, third_rest = sum_blocks(ADD, plain, full, count, count, options, (HALF,), True)
    return first + first_rest, second + second_rest, third + third_rest


@triton.jit
def weighted(d, param, offsets, count, eta, ADAPTIVE: tl.constexpr, MASKED: tl.constexpr):
    """T_w d with T_w = |p| + eta when adaptive, else d."""
    if ADAPTIVE:
        return (tl.abs(load_float(param, offsets, count, MASKED)) + eta) * d
    else:
        return d


@triton.jit
def add_squares(d, sums):
    """A block of terms, added to three blocks of sums: of medium, big and small ones."""
    medium, big, small = sums
    size = tl.abs(d)
    is_big, is_small = size >= _LARGE, size < _SMALL
    down, up, same = tl.where(is_big, d * SHRINK, 0.0), tl.where(is_small, d * GROW, 0.0), tl.where(is_big | is_small, 0.0, d)
    return tl.fma(same, same, medium), tl.fma(down, down, big), tl.fma(up, up, small)


@triton.jit
def join_kinds(medium, big, small):
    """Three sums as one, and its kind: that of the largest terms."""
    with_big = big + medium * SHRINK * SHRINK
    with_medium = medium + small * (1.0 / GROW) * (1.0 / GROW)
    kind = tl.where(big != 0.0, SHRUNK, tl.where(medium != 0.0, IN_RANGE, GROWN))
    return tl.where(big != 0.0, with_big, tl.where(medium != 0.0, with_medium, small)), kind
