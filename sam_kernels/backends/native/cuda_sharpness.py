"""Gibbs weights of norms and draws from them with the CUDA kernels of ``csrc/cuda/sharpness.cu``: one launch each, float64 throughout."""

from __future__ import annotations

import torch
from torch import Tensor

from sam_kernels.backends.native._cuda_lists import _cuda, _lists, _stream

__all__ = ["sharpness_sample", "sharpness_weights"]


def sharpness_weights(norms: Tensor, *, beta: float | Tensor) -> Tensor:  # (B,), () -> (B,)
    """See :func:`sam_kernels.functional.sharpness_weights`."""
    weights = torch.empty_like(norms)
    _cuda.sharpness_weights(tensors=_lists.describe([norms, weights]), beta=beta, stream=_stream(norms.device))
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
    _cuda.sharpness_sample(tensors=tensors, beta=beta, replacement=replacement, seed=seed, stream=_stream(norms.device))
    return indices, weights
