"""What ``csrc/common/sampling.h`` has for one norm, for blocks of them, in the same operations."""

from __future__ import annotations

import struct

import triton
import triton.language as tl
from torch import Tensor

from sam_kernels.backends.triton._random import seed_key, uniforms

__all__ = ["Beta", "beta_arguments", "exponents", "gumbel_keys", "largest_norm", "read_beta", "terms", "total_of"]

_LOWEST = tl.constexpr(-(2.0**1023) * (2.0 - 2.0**-52))  # of float64
_INFINITY = tl.constexpr(float("inf"))

Beta = tuple[Tensor | None, int, int]


def beta_arguments(beta: float | Tensor) -> Beta:
    """A () tensor, or the two halves of a number's bits: Triton takes a number for float32."""
    if isinstance(beta, Tensor):
        return beta, 0, 0
    return None, *seed_key(struct.unpack("<Q", struct.pack("<d", beta))[0])


@triton.jit
def read_beta(beta, low, high):  # float64
    if beta is not None:
        return tl.load(beta).to(tl.float64)
    else:
        bits = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
        return bits.to(tl.float64, bitcast=True)


@triton.jit
def largest_norm(norms, count, BLOCK_SIZE: tl.constexpr):  # float64
    lanes = tl.arange(0, BLOCK_SIZE)
    largest = tl.full([BLOCK_SIZE], -_INFINITY, tl.float64)
    for block in range(0, count, BLOCK_SIZE):
        n = tl.load(norms + block + lanes, mask=block + lanes < count, other=-_INFINITY).to(tl.float64)
        largest = tl.where(n > largest, n, largest)  # not so for NaN
    return tl.max(largest)


@triton.jit
def exponents(n, largest, beta):
    """beta (n - max n). A difference that leaves the range is the lowest number: it would be NaN times a beta of 0."""
    below = n - largest
    return beta * tl.where(below < _LOWEST, _LOWEST, below)


@triton.jit
def terms(norms, offsets, count, largest, beta):
    """p times a constant, 0 beyond the end; NaN for a norm that is not finite, with a beta of 0 too."""
    n = tl.load(norms + offsets, mask=offsets < count, other=0.0).to(tl.float64)
    return tl.where(offsets < count, tl.exp(exponents(n, largest, beta)) + n * 0.0, 0.0)


@triton.jit
def total_of(norms, count, largest, beta, BLOCK_SIZE: tl.constexpr):  # float64
    lanes = tl.arange(0, BLOCK_SIZE)
    sums = tl.zeros([BLOCK_SIZE], tl.float64)
    for block in range(0, count, BLOCK_SIZE):
        sums += terms(norms, block + lanes, count, largest, beta)
    return tl.sum(sums)


@triton.jit
def gumbel_keys(norms, offsets, count, largest, beta, key_low, key_high):  # offsets: int64
    """Successive draws without replacement are in their order, the largest first. Never NaN; -inf beyond the end."""
    n = tl.load(norms + offsets, mask=offsets < count, other=0.0).to(tl.float64)
    keys = exponents(n, largest, beta) - tl.log(-tl.log(uniforms(offsets, key_low, key_high)))
    return tl.where((offsets < count) & (keys == keys), keys, -_INFINITY)
