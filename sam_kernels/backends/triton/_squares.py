"""Sums of squares of terms that are seen once: each term goes at once into the sum of its size (the kinds of ``_finish.py``)."""

from __future__ import annotations

import triton
import triton.language as tl

from sam_kernels.backends.triton._finish import GROW, GROWN, IN_RANGE, SHRINK, SHRUNK

__all__ = ["add_squares", "join_kinds"]

# Squares of a chunk of terms between these add up to less than 2^100, as those of larger ones times SHRINK and smaller ones times GROW do.
_LARGE = tl.constexpr(2.0**40)
_SMALL = tl.constexpr(2.0**-56)


@triton.jit
def add_squares(d, medium, big, small):
    """A block of terms, added to three blocks of sums."""
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
