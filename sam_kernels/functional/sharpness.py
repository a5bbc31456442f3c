"""Weights of samples by their gradient norms, and draws by these weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sam_kernels import _dispatch, _validate
from sam_kernels.functional._library import operation
from sam_kernels.operations import Number, number_on

__all__ = ["sharpness_sample", "sharpness_weights"]


def _fake_weights(*, norms: Tensor, **_: Any) -> Tensor:
    return norms.new_empty(norms.shape)


def _fake_sample(*, norms: Tensor, num_samples: int, **_: Any) -> tuple[Tensor, Tensor]:
    return norms.new_empty(num_samples, dtype=torch.int64), norms.new_empty(num_samples)


@operation(fake=_fake_weights)
def sharpness_weights(
    norms: Tensor,  # (B,) float32 or float64
    *,
    beta: Number,
) -> Tensor:  # (B,) of the same dtype
    """p = softmax(beta norms): the Gibbs weights of Reweighted SAM (arXiv 2509.18001), from gradient norms of samples or micro-batches.
    A negative ``beta`` prefers short gradients.

    Arithmetic is float64, with the largest norm subtracted, and rounded once: backends agree within 2 B + 40 roundings of float64. With
    ``beta`` 0 each weight is exactly 1/B, correctly rounded (float32: up to 2^28 norms). A norm that is not finite makes every weight NaN,
    with ``beta`` 0 too. ``beta`` is finite.
    The kernels for devices read the norms three times and write the weights: 4 B s bytes. A ``beta`` that is negative, or a tensor, adds a
    copy of the norms.

    Raises TypeError for norms that are no dense float32 or float64 tensor, ValueError for a wrong shape, no norms, or a wrong ``beta``.
    """
    op = "sharpness_weights"
    norms, beta = _checked(op, norms, beta)
    weights: Tensor = _dispatch.select_sharpness(norms.device.type).sharpness_weights(norms, beta=beta)
    return weights


@operation(scheduled=("seed",), fake=_fake_sample)
def sharpness_sample(
    norms: Tensor,  # (B,) float32 or float64
    num_samples: int,
    *,
    beta: Number,
    replacement: bool,
    seed: int,
) -> tuple[Tensor, Tensor]:  # (k,) int64, (k,) of the norms' dtype
    """k draws of samples with probabilities p = softmax(beta norms): (indices in the order drawn, weights). For any f, the expectation of
    the sum over j of weights[j] f[indices[j]] is the mean of f, (1/B) sum f, as long as 1/p does not leave the range of float64.

    With ``replacement``, draw j is the first i with p_0 + ... + p_i > u_j, its weight 1 / (k B p_i). Without, draws are successive ones of
    what is left: the k largest of beta n_i - log(-log u_i), the largest first (Gumbel; ties: lower index first). The weight of the r-th,
    from 1 on, is (R_r / p + k - r) / (k B), R_r being the sum of p over all that were not drawn before it (Des Raj, "Some estimators in
    sampling with varying probabilities without replacement", JASA 51, 1956). R_r is summed as it is: 1 less what was drawn would have no
    digits left. The weight of a sample whose 1/p leaves that range is infinite, never NaN.

    u is a function of ``seed`` (in [0, 2^64)) and j or i: Philox4x32-10 (Salmon et al., SC 2011) with key (seed & 0xffffffff, seed >> 32)
    and counter (i & 0xffffffff, i >> 32, 0, 2), u = ((word 0 << 20 | word 1 >> 12) + 0.5) 2^-52. So a seed has the same draws on every
    backend, unless float64 rounds to the other side of a boundary: with replacement where u_j is within (4 B + 40) 2^-53 of one of the
    sums of p, without where two keys are within 2^-42 of each other, or 2^-51 of their size.

    Where a norm is not finite every weight is NaN; indices are in [0, B) all the same, and distinct without ``replacement``.
    Reads the norms, a few times for each block of draws or samples, and writes (8 + s) k bytes. Nobody waits for the device.

    Raises TypeError or ValueError as :func:`sharpness_weights`, and for a ``num_samples`` that is no integer of at least 1 (at most B
    without replacement), a ``seed`` out of range and a ``replacement`` that is no bool.
    """
    op = "sharpness_sample"
    norms, beta = _checked(op, norms, beta)
    _validate.check_flag(op, "replacement", replacement)
    seed = _validate.check_seed(op, "seed", seed)
    num_samples = _validate.check_count(op, "num_samples", num_samples, low=1, high=None if replacement else len(norms))
    indices, weights = _dispatch.select_sharpness(norms.device.type).sharpness_sample(
        norms, num_samples, beta=beta, replacement=replacement, seed=seed
    )
    return indices, weights


def _checked(op: str, norms: object, beta: Number) -> tuple[Tensor, Number]:
    """Contiguous norms, and beta ≥ 0 as a number or a () tensor on their device: beta n = |beta| (sign(beta) n)."""
    tensor = _validate.check_tensor(op, "norms", norms)
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: norms has dtype {tensor.dtype}; supported are float32, float64")
    if tensor.dim() != 1 or tensor.numel() == 0:
        raise ValueError(f"{op}: norms must have shape (B,) with B at least 1, got {tuple(tensor.shape)}")
    beta = number_on(_validate.check_number_or_tensor(op, "beta", beta), tensor.device)
    tensor = tensor.resolve_neg().contiguous()
    if isinstance(beta, Tensor):
        return torch.where(beta < 0, -tensor, tensor), beta.abs()
    return (-tensor, -beta) if beta < 0 else (tensor, beta)
