"""Gibbs weights of gradient norms, and draws from them whose weights make an unbiased mean.

Sources: Reweighted SAM (arXiv 2509.18001); successive draws by Gumbel's keys (Kool et al., arXiv 1903.06059); the ordered estimator of
Des Raj, "Some estimators in sampling with varying probabilities without replacement", JASA 51 (1956).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sam_kernels.reference.random import philox

__all__ = ["gibbs_terms", "ordered_weights", "replacement_weights", "sharpness_sample", "sharpness_weights", "uniforms"]


def exponents(norms: Tensor, beta: float) -> Tensor:  # (B,) -> (B,) float64
    """beta (n - max n), for a negative beta of the least n. A difference that leaves the range is the lowest number: it would be NaN times
    a beta of 0."""
    if beta < 0:
        return exponents(-norms, -beta)
    wide = norms.to(torch.float64)
    largest = wide[~wide.isnan()].max() if not wide.isnan().all() else wide[0]
    return beta * (wide - largest).clamp(min=torch.finfo(torch.float64).min)


def gibbs_terms(norms: Tensor, beta: float) -> Tensor:  # (B,) -> (B,) float64
    """p times a constant: exp(beta (n - max n)). Those of norms that are not finite are NaN."""
    terms = torch.exp(exponents(norms, beta))
    return torch.where(norms.isfinite(), terms, torch.nan)


def uniforms(indices: Tensor, seed: int) -> Tensor:  # (n,) int64 -> (n,) float64 in (0, 1)
    """u_i: 52 bits of Philox's first two words and a half, of the counter (i, 0, stream 2)."""
    zeros = torch.zeros_like(indices)
    counter = torch.stack([indices & 0xFFFFFFFF, indices >> 32, zeros, zeros + 2])
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return ((words[0] << 20 | words[1] >> 12).to(torch.float64) + 0.5) * 2.0**-52


def sharpness_weights(norms: Tensor, *, beta: float) -> Tensor:  # (B,) -> (B,) of the same dtype
    """p = exp(beta n) / sum exp(beta n)."""
    terms = gibbs_terms(norms, beta)
    return (terms / terms.sum()).to(norms.dtype)


def replacement_weights(terms: Tensor, drawn: Tensor) -> Tensor:  # (B,) float64, (k,) int64 -> (k,) float64
    """1 / (k B p) for each draw."""
    return terms.sum() / terms[drawn] / (len(drawn) * len(terms))


def ordered_weights(terms: Tensor, drawn: Tensor) -> Tensor:  # (B,) float64, (k,) int64 -> (k,) float64
    """(R_r / p_r + k - r) / (k B) for the r-th that was drawn, R_r being the probability of all that were not drawn before it."""
    count, draws = len(terms), len(drawn)
    remaining = torch.ones(count, dtype=torch.bool)
    weights = torch.empty(draws, dtype=torch.float64)
    for r, i in enumerate(drawn.tolist()):
        rest = terms[remaining].sum()
        ratio = torch.inf if rest == 0 else rest / terms[i]
        weights[r] = (ratio + (draws - r - 1)) / (draws * count)
        remaining[i] = False
    return weights if terms.isfinite().all() else torch.full_like(weights, torch.nan)


def sharpness_sample(
    norms: Tensor,  # (B,)
    num_samples: int,
    *,
    beta: float,
    replacement: bool,
    seed: int,
) -> tuple[Tensor, Tensor]:  # (k,) int64, (k,) of the norms' dtype
    """Draws by inverse transform, or, without replacement, successive ones by the largest of beta n - log(-log u)."""
    terms = gibbs_terms(norms, beta)
    if replacement:
        targets = uniforms(torch.arange(num_samples), seed) * terms.sum()
        reached = (terms.cumsum(0) > targets[:, None]) & (terms > 0)  # (k, B)
        last = int(torch.where(terms > 0, torch.arange(len(terms)), 0).max())
        drawn = torch.where(reached.any(1), reached.to(torch.int8).argmax(1), last)
        return drawn, replacement_weights(terms, drawn).to(norms.dtype)
    keys = exponents(norms, beta) - torch.log(-torch.log(uniforms(torch.arange(len(norms)), seed)))
    drawn = torch.sort(keys.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), descending=True, stable=True).indices[
        :num_samples
    ]
    return drawn, ordered_weights(terms, drawn).to(norms.dtype)
