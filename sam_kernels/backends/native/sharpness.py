"""Gibbs weights of norms and draws from them with the CPU kernels of ``csrc/cpu/sharpness.cpp``: float64 throughout, one thread.

Draws with replacement are binary searches in the sums of all weights, those without are the first k of a partial sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sam_kernels.backends.native._arguments import value_of
from sam_kernels.backends.native._cpu_lists import _cpu, _lists

__all__ = ["sharpness_sample", "sharpness_weights"]


def sharpness_weights(norms: Tensor, *, beta: float | Tensor) -> Tensor:  # (B,), () -> (B,)
    """See :func:`sam_kernels.functional.sharpness_weights`."""
    weights = torch.empty_like(norms)
    _cpu.sharpness_weights(tensors=_lists.describe([norms, weights]), beta=value_of(beta))
    return weights


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
    tensors = _lists.describe([norms, weights, indices.view(torch.float64)])
    _cpu.sharpness_sample(tensors=tensors, beta=value_of(beta), replacement=replacement, seed=seed)
    return indices, weights
