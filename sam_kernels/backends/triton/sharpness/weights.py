"""p = softmax(beta norms), in one program.

Specification: ``sam_kernels.reference.sharpness_weights``; twin: ``csrc/cuda/sharpness.cu``. float32 or float64 norms, float64
arithmetic, one rounding. The order of sums depends on B alone. Reads the norms three times, writes the weights: 4 B s bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sam_kernels.backends.triton.per_sample._launch import launch
from sam_kernels.backends.triton.sharpness._gibbs import beta_arguments, largest_norm, read_beta, terms, total_of

__all__ = ["sharpness_weights"]

_BLOCK = 1024  # norms at a time: 8 a thread, and few rounds for a batch of a few thousand samples


@triton.jit(do_not_specialize=["beta_low", "beta_high", "count"])
def _weights_kernel(
    weights,  # (B,) float32 or float64
    norms,  # (B,) of the same dtype
    beta,  # () float32 or float64, or None
    beta_low,  # halves of a float64's bits
    beta_high,
    count,
    BLOCK_SIZE: tl.constexpr,
):
    factor = read_beta(beta, beta_low, beta_high)
    largest = largest_norm(norms, count, BLOCK_SIZE)
    total = total_of(norms, count, largest, factor, BLOCK_SIZE)
    lanes = tl.arange(0, BLOCK_SIZE)
    for block in range(0, count, BLOCK_SIZE):
        p = terms(norms, block + lanes, count, largest, factor) / total
        tl.store(weights + block + lanes, p.to(weights.dtype.element_ty), mask=block + lanes < count)


def sharpness_weights(norms: Tensor, *, beta: float | Tensor) -> Tensor:  # (B,), () -> (B,)
    """See :func:`sam_kernels.functional.sharpness_weights`."""
    weights = torch.empty_like(norms)
    launch(_weights_kernel, 1, norms.device, weights, norms, *beta_arguments(beta), norms.numel(), BLOCK_SIZE=_BLOCK)
    return weights
