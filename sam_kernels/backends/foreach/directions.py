"""Directions made of the gradient and a moving average of earlier ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_kernels.backends.foreach._rows import arithmetic_dtypes, number_of, scale_, widen, write

__all__ = ["direction_norm_", "weighted_directions"]


def weighted_directions(
    grads: Sequence[Tensor],
    ema: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    inverse: Tensor | float,
    grad_weight: float,
    ema_weight: float,
) -> list[Tensor]:
    """grad_weight inverse g + ema_weight m in the arithmetic type. g is left out where its weight is 0: it may not be finite."""
    averages = widen(ema, dtypes, copy=True)
    torch._foreach_mul_(averages, ema_weight)
    if grad_weight != 0:
        scaled = widen(grads, dtypes, copy=True)
        factor = grad_weight * inverse
        scale_(scaled, factor if isinstance(factor, float) else number_of(factor))
        torch._foreach_add_(averages, scaled)
    return averages


def direction_norm_(
    grads: Sequence[Tensor],
    ema: Sequence[Tensor],
    params: Sequence[Tensor] | None,
    *,
    kind: str,
    first_step: bool,
    theta: float,
    sigma: float,
    lmbda: float,
    adaptive: bool,
    eta: float,
    grad_scale: Tensor | None,
) -> Tensor:  # () float64
    """See :func:`sam_kernels.functional.direction_norm_`."""
    dtypes = arithmetic_dtypes(grads, ema, params)
    scaled = widen(grads, dtypes, copy=grad_scale is not None)
    if grad_scale is not None:
        scale_(scaled, number_of(1.0 / grad_scale.reshape(()).to(torch.float64)))
    before = [torch.zeros_like(grad) for grad in scaled] if first_step else widen(ema, dtypes)
    if first_step:
        after = directions = scaled
    else:
        decay, gain = (lmbda, 1.0 - lmbda) if kind == "friendly" else (1.0 - theta, theta)
        after = list(torch._foreach_add(torch._foreach_mul(before, decay), scaled, alpha=gain))
        directions = list(torch._foreach_add(scaled, before, alpha=-sigma)) if kind == "friendly" else after
    # What is not finite stays out of the averages and shows in the norm.
    write(ema, [torch.where(torch.isfinite(g), a, b) for g, a, b in zip(scaled, after, before, strict=True)], None)
    terms = [direction.to(torch.float64) for direction in directions]
    if adaptive and params is not None:
        weights = torch._foreach_abs([p.to(torch.float64) for p in params])
        torch._foreach_add_(weights, eta)
        terms = list(torch._foreach_mul(weights, terms))
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(terms)))
    return norm
