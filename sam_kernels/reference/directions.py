"""Directions of ascent made of the gradient g and a moving average m of earlier ones.

Sources: VaSSO (arXiv 2309.15639), Friendly SAM (arXiv 2403.12350).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_kernels.reference.norms import grad_norm

__all__ = ["direction_norm_", "direction_updated", "direction_used"]


def direction_updated(
    g: Tensor,  # any shape
    m: Tensor | None,  # the shape of g; None on the first step
    *,
    kind: str,
    theta: float = 0.9,
    sigma: float = 1.0,
    lmbda: float = 0.6,
) -> tuple[Tensor, Tensor]:  # the direction, the new m
    """VaSSO goes along the new average, Friendly SAM along the gradient without the old one."""
    if m is None:
        return g, g
    if kind == "vasso":
        m = (1 - theta) * m + theta * g
        return m, m
    return g - sigma * m, lmbda * m + (1 - lmbda) * g


def direction_used(
    g: Tensor,  # any shape
    m: Tensor | None,  # the shape of g; None on the first step
    *,
    kind: str,
    sigma: float = 1.0,
    lmbda: float = 0.6,
) -> Tensor:
    """The same direction from the new m: Friendly SAM's old one is (m - (1 - lmbda) g) / lmbda."""
    if m is None:
        return g
    return m if kind == "vasso" else (1 + sigma * (1 - lmbda) / lmbda) * g + (-sigma / lmbda) * m


def direction_norm_(
    grads: Sequence[Tensor],  # n tensors
    ema: list[Tensor | None],  # n tensors
    params: Sequence[Tensor] | None = None,  # n tensors
    *,
    kind: str,
    theta: float = 0.9,
    sigma: float = 1.0,
    lmbda: float = 0.6,
    adaptive: bool = False,
    eta: float = 0.0,
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
) -> Tensor:  # ()
    """m <- its update where g is finite, and the norm of the directions d (:func:`grad_norm`)."""
    directions = []
    for i, (g, m) in enumerate(zip(grads, ema, strict=True)):
        g = g if grad_scale is None else g / grad_scale
        d, new_m = direction_updated(g, m, kind=kind, theta=theta, sigma=sigma, lmbda=lmbda)
        kept = torch.where(g.isfinite(), new_m, torch.zeros_like(g) if m is None else m)
        if m is None:
            ema[i] = kept
        else:
            m.copy_(kept)
        directions.append(d)
    return grad_norm(directions, params, adaptive=adaptive, eta=eta, found_inf=found_inf)
