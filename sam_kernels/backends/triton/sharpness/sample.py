"""Draws by Gibbs weights, and the weights that make their mean unbiased.

Specification: ``sam_kernels.reference.sharpness_sample``; twin: ``csrc/cuda/sharpness.cu``. float32 or float64 norms, float64
arithmetic, one rounding. The order of sums depends on B alone.

With replacement, a program for each block of draws walks the sums of all weights, block by block with what came before carried along.
Without, a program for each block of items compares their keys with all others: how many precede an item is its place, and what is left when
it is drawn is summed in the same loop. No sort, no second launch: B^2 comparisons, of which a batch has few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sam_kernels.backends.triton._random import seed_key, uniforms
from sam_kernels.backends.triton.per_sample._launch import launch
from sam_kernels.backends.triton.sharpness._gibbs import beta_arguments, gumbel_keys, largest_norm, read_beta, terms, total_of

__all__ = ["sharpness_sample"]

_DRAWS, _DRAW_BLOCK = 16, 256  # of a program, and norms at a time: 32 comparisons a thread and step
_ITEMS, _RANK_BLOCK = 16, 128  # one key a thread and step, and 16 comparisons: 256 norms would spill registers


@triton.jit(do_not_specialize=["beta_low", "beta_high", "key_low", "key_high", "count", "draws"])
def _draw_kernel(
    indices,  # (k,) int64
    weights,  # (k,) float32 or float64
    norms,  # (B,) of the same dtype
    beta,  # () float32 or float64, or None
    beta_low,  # halves of a float64's bits
    beta_high,
    key_low,
    key_high,
    count,
    draws,
    DRAWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    factor = read_beta(beta, beta_low, beta_high)
    largest = largest_norm(norms, count, BLOCK_SIZE)
    total = total_of(norms, count, largest, factor, BLOCK_SIZE)
    mine = tl.program_id(0).to(tl.int64) * DRAWS + tl.arange(0, DRAWS)
    targets = uniforms(mine, key_low, key_high) * total
    lanes = tl.arange(0, BLOCK_SIZE)
    found = tl.full([DRAWS], -1, tl.int64)
    last = tl.full([], 0, tl.int64)  # of positive weight
    before = total * 0.0
    for block in range(0, count, BLOCK_SIZE):
        z = terms(norms, block + lanes, count, largest, factor)
        sums = before + tl.cumsum(z)
        # Sums are rounded in an order of their own: one may rise where there is no weight.
        first = tl.min(tl.where((sums[None, :] > targets[:, None]) & (z[None, :] > 0.0), lanes[None, :], BLOCK_SIZE), axis=1)
        found = tl.where((found < 0) & (first < BLOCK_SIZE), block + first.to(tl.int64), found)
        last = tl.maximum(last, tl.max(tl.where(z > 0.0, block + lanes, 0)).to(tl.int64))
        before += tl.sum(z)
    index = tl.where(found < 0, last, found)  # u total was rounded to the end, or is NaN
    places = draws.to(tl.float64) * count.to(tl.float64)
    weight = total / terms(norms, index, count, largest, factor) / places
    tl.store(indices + mine, index, mask=mine < draws)
    tl.store(weights + mine, weight.to(weights.dtype.element_ty), mask=mine < draws)


@triton.jit(do_not_specialize=["beta_low", "beta_high", "key_low", "key_high", "count", "draws"])
def _rank_kernel(
    indices,  # (k,) int64
    weights,  # (k,) float32 or float64
    norms,  # (B,) of the same dtype
    beta,  # () float32 or float64, or None
    beta_low,  # halves of a float64's bits
    beta_high,
    key_low,
    key_high,
    count,
    draws,
    ITEMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    factor = read_beta(beta, beta_low, beta_high)
    largest = largest_norm(norms, count, BLOCK_SIZE)
    mine = tl.program_id(0).to(tl.int64) * ITEMS + tl.arange(0, ITEMS)
    own = gumbel_keys(norms, mine, count, largest, factor, key_low, key_high)
    lanes = tl.arange(0, BLOCK_SIZE).to(tl.int64)
    place = tl.zeros([ITEMS], tl.int64)
    rest = tl.zeros([ITEMS], tl.float64)
    for block in range(0, count, BLOCK_SIZE):
        others = block + lanes
        keys = gumbel_keys(norms, others, count, largest, factor, key_low, key_high)[None, :]
        z = terms(norms, others, count, largest, factor)[None, :]
        precedes = (keys > own[:, None]) | ((keys == own[:, None]) & (others[None, :] < mine[:, None]))
        place += tl.sum(precedes.to(tl.int32), axis=1)
        rest += tl.sum(z * tl.where(precedes, 0.0, 1.0), axis=1)  # NaN, if it is, from wherever it was drawn
    z = terms(norms, mine, count, largest, factor)
    ratio = tl.where(rest == 0.0, float("inf"), rest / z)  # terms that vanish would be 0 / 0
    places = draws.to(tl.float64) * count.to(tl.float64)
    weight = (ratio + (draws - 1 - place).to(tl.float64)) / places
    is_drawn = (mine < count) & (place < draws)
    tl.store(indices + place, mine, mask=is_drawn)
    tl.store(weights + place, weight.to(weights.dtype.element_ty), mask=is_drawn)


def sharpness_sample(
    norms: Tensor,  # (B,)
    num_samples: int,
    *,
    beta: float | Tensor,  # ()
    replacement: bool,
    seed: int,
) -> tuple[Tensor, Tensor]:  # (k,) int64, (k,)
    """See :func:`sam_kernels.functional.sharpness_sample`."""
    indices, weights = norms.new_empty(num_samples, dtype=torch.int64), norms.new_empty(num_samples)
    arguments = indices, weights, norms, *beta_arguments(beta), *seed_key(seed), norms.numel(), num_samples
    if replacement:
        launch(_draw_kernel, -(-num_samples // _DRAWS), norms.device, *arguments, DRAWS=_DRAWS, BLOCK_SIZE=_DRAW_BLOCK)
    else:
        launch(_rank_kernel, -(-norms.numel() // _ITEMS), norms.device, *arguments, ITEMS=_ITEMS, BLOCK_SIZE=_RANK_BLOCK)
    return indices, weights
