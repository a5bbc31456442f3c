"""Gibbs weights of norms and draws from them with torch's own functions: the fallback on any device that has float64.

Nothing here waits for a device. (``torch.cumsum`` on CUDA is refused under ``torch.use_deterministic_algorithms``.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sam_kernels.backends.foreach.random import uniforms

__all__ = ["sharpness_sample", "sharpness_weights"]


def _exponents(wide: Tensor, beta: float | Tensor) -> Tensor:  # (B,) float64, () -> (B,) float64
    """beta (n - max n). A difference that leaves the range is the lowest number: it would be NaN times a beta of 0."""
    largest = torch.where(wide.isnan(), -torch.inf, wide).amax()
    return (wide - largest).clamp(min=torch.finfo(torch.float64).min) * (beta.double() if isinstance(beta, Tensor) else beta)


def _terms(wide: Tensor, exponents: Tensor) -> Tensor:  # (B,) float64
    """p times a constant; NaN for a norm that is not finite."""
    return exponents.exp() + wide * 0.0


def sharpness_weights(norms: Tensor, *, beta: float | Tensor) -> Tensor:  # (B,), () -> (B,)
    """See :func:`sam_kernels.functional.sharpness_weights`."""
    wide = norms.double()
    terms = _terms(wide, _exponents(wide, beta))
    return (terms / terms.cumsum(0)[-1]).to(norms.dtype)  # a sum's order would depend on the number of threads


def sharpness_sample(
    norms: Tensor,  # (B,)
    num_samples: int,
    *,
    beta: float | Tensor,  # ()
    replacement: bool,
    seed: int,
) -> tuple[Tensor, Tensor]:  # (k,) int64, (k,)
    """See :func:`sam_kernels.functional.sharpness_sample`."""
    wide = norms.double()
    exponents = _exponents(wide, beta)
    draw = _draws if replacement else _successive_draws
    indices, weights = draw(exponents, _terms(wide, exponents), num_samples, seed)
    return indices, (weights / (num_samples * norms.numel())).to(norms.dtype)


def _draws(exponents: Tensor, terms: Tensor, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inverse transform. Weights are times k B."""
    sums = terms.cumsum(0)
    total = sums[-1]
    # A device adds in an order of its own: sums may fall by a rounding, and rise where a term is zero.
    rising = torch.where(terms > 0, sums, 0.0).cummax(0).values
    last = torch.where(terms > 0, torch.arange(len(terms), device=terms.device), 0).amax()
    targets = uniforms(torch.arange(draws, device=terms.device), seed) * total
    indices = torch.searchsorted(rising, targets, right=True).minimum(last)
    return indices, total / terms[indices]


def _successive_draws(exponents: Tensor, terms: Tensor, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gumbel's keys, sorted. Weights are times k B."""
    keys = exponents - (-uniforms(torch.arange(len(terms), device=terms.device), seed).log()).log()
    order = torch.where(keys.isnan(), -torch.inf, keys).sort(descending=True, stable=True).indices
    indices, ordered = order[:draws].contiguous(), terms[order]
    rest = ordered.flip(0).cumsum(0).flip(0)[:draws] + terms.sum() * 0.0  # NaN where a norm is not finite, wherever that is drawn
    later = torch.arange(draws - 1, -1, -1, device=terms.device)
    return indices, torch.where(rest == 0.0, torch.inf, rest / ordered[:draws]) + later
