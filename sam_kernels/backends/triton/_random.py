"""Random numbers that are a function of (seed, row, element): what ``csrc/common/random.h`` does, in the same order, so the same bits.

Element i of a row takes output word (i % 1024) // 256 of a Philox4x32-10 counter, so a counter serves four elements and each run of 256
elements takes consecutive counters. Constants and their errors are explained there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import core

__all__ = [
    "PERTURBATION_STREAM",
    "ROUNDING_STREAM",
    "SAMPLING_STREAM",
    "normal_pair",
    "rademacher",
    "seed_key",
    "tile_offsets",
    "tile_words",
    "uniforms",
]

TILE_LANES = tl.constexpr(256)
TILE = tl.constexpr(1024)
PERTURBATION_STREAM = tl.constexpr(0)
ROUNDING_STREAM = tl.constexpr(1)
SAMPLING_STREAM = tl.constexpr(2)

_LOG = [
    float.fromhex(text)
    for text in (
        "0x1.41ee0ep-3", "-0x1.07d0f2p-2", "0x1.0ce07cp-2", "-0x1.226e4ap-2",
        "0x1.54788ap-2", "-0x1.99a596p-2", "0x1.000220p-1", "-0x1.55554ap-1",
    )
]  # fmt: skip
_Q0, _Q1, _Q2, _Q3, _Q4, _Q5, _Q6, _Q7 = (tl.constexpr(number) for number in _LOG)
_MINUS_2_LOG_2_HIGH = tl.constexpr(float.fromhex("-0x1.62e300p+0"))
_MINUS_2_LOG_2_LOW = tl.constexpr(float.fromhex("-0x1.2fefa2p-16"))
_SINE = [float.fromhex(text) for text in ("-0x1.2ef84ap-8", "0x1.4668e6p-4", "-0x1.4abbe6p-1", "0x1.921fb6p+0")]
_S0, _S1, _S2, _S3 = (tl.constexpr(number) for number in _SINE)
_COSINE = [float.fromhex(text) for text in ("0x1.d47918p-11", "-0x1.55b142p-6", "0x1.03c1aep-2", "-0x1.3bd3ccp+0")]
_C0, _C1, _C2, _C3 = (tl.constexpr(number) for number in _COSINE)


def seed_key(seed: int) -> tuple[int, int]:
    """The two halves of a 64-bit seed as signed 32-bit numbers: whatever the seed, the type a kernel is compiled for."""
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):  # uint32
    FIRST: tl.constexpr = 0xD2511F53
    SECOND: tl.constexpr = 0xCD9E8D57
    for _ in tl.static_range(10):
        first, second = c0, c2
        c0 = tl.umulhi(SECOND, second) ^ c1 ^ k0
        c2 = tl.umulhi(FIRST, first) ^ c3 ^ k1
        c1 = core.mul(second, SECOND, sanitize_overflow=False)
        c3 = core.mul(first, FIRST, sanitize_overflow=False)
        k0 = core.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = core.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def tile_words(element, row, key_low, key_high, STREAM: tl.constexpr, LANES: tl.constexpr):  # four blocks (LANES,) uint32
    """The words of LANES counters, for 4 LANES elements from ``element`` (int64, a multiple of 4 LANES, a multiple of TILE)."""
    tl.static_assert(LANES % 256 == 0, "whole tiles only: half a block of 2048 elements or more")
    counter = element // 4
    zero = tl.zeros([LANES], tl.uint32)
    c0 = counter.to(tl.uint32) + tl.arange(0, LANES).to(tl.uint32)  # no carry: the lanes are the low bits
    c1 = zero + (counter >> 32).to(tl.uint32)
    k0, k1 = key_low.to(tl.uint32, bitcast=True), key_high.to(tl.uint32, bitcast=True)
    return _philox(c0, c1, zero + row.to(tl.uint32), zero + STREAM, k0, k1)


@triton.jit
def tile_offsets(WORD: tl.constexpr, LANES: tl.constexpr):  # (LANES,) int32
    """The elements, from the one given to :func:`tile_words`, that a word of its counters is for."""
    lanes = tl.arange(0, LANES)
    return lanes // TILE_LANES * TILE + WORD * TILE_LANES + lanes % TILE_LANES


@triton.jit
def rademacher(word):
    """-1 where bit 31 is set, else 1."""
    return ((word & 0x80000000) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _radius(word):
    """sqrt(-2 log u), u = ((word >> 8) + 1) 2^-24."""
    u = ((word >> 8).to(tl.int32) + 1).to(tl.float32) * (2.0**-24)
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    q = f * _Q0 + _Q1
    q = q * f + _Q2
    q = q * f + _Q3
    q = q * f + _Q4
    q = q * f + _Q5
    q = q * f + _Q6
    q = q * f + _Q7
    square = f * f
    total = ((f * square) * q + e * _MINUS_2_LOG_2_LOW) + square
    return tl.sqrt_rn((total + f * -2.0) + e * _MINUS_2_LOG_2_HIGH)


@triton.jit
def normal_pair(first, second):
    """Two standard normals from two words (Box and Muller)."""
    radius = _radius(first)
    turn = (second >> 8).to(tl.int32)
    quadrant = (turn + (1 << 21)) >> 22
    t = (turn - quadrant * (1 << 22)).to(tl.float32) * (2.0**-22)
    square = t * t
    sine = square * _S0 + _S1
    sine = sine * square + _S2
    sine = sine * square + _S3
    sine = sine * t
    cosine = square * _C0 + _C1
    cosine = cosine * square + _C2
    cosine = cosine * square + _C3
    cosine = cosine * square + 1.0
    is_odd = (quadrant & 1) != 0
    x = tl.where(is_odd, sine, cosine)
    y = tl.where(is_odd, cosine, sine)
    x = tl.where(((quadrant + 1) & 2) != 0, -x, x)
    y = tl.where((quadrant & 2) != 0, -y, y)
    return radius * x, radius * y


@triton.jit
def uniforms(indices, key_low, key_high):  # block of int64 -> block of float64 in (0, 1)
    """52 random bits and a half for each index: csrc/common/sampling.h."""
    zero = (indices * 0).to(tl.uint32)
    k0, k1 = key_low.to(tl.uint32, bitcast=True), key_high.to(tl.uint32, bitcast=True)
    upper, lower, _, _ = _philox(indices.to(tl.uint32), (indices >> 32).to(tl.uint32), zero, zero + SAMPLING_STREAM, k0, k1)
    bits = (upper.to(tl.int64) << 20) | (lower >> 12).to(tl.int64)
    return (bits.to(tl.float64) + 0.5) * (2.0**-52)
