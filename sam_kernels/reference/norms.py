"""Norms of gradients, and of whatever takes their place. ASAM's T = |p| + eta: arXiv 2102.11600."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["grad_norm", "grad_norms"]

Tensors = Sequence[Tensor]


def grad_norm(
    grads: Tensors,  # n tensors
    params: Tensors | None = None,  # n tensors
    *,
    adaptive: bool = False,
    eta: float = 0.0,
    found_inf: Tensor | None = None,  # ()
) -> Tensor:  # ()
    """sqrt(sum g^2) over all gradients; sqrt(sum (T g)^2), T = |p| + eta, when ``adaptive``."""
    if adaptive:
        assert params is not None
        grads = [(abs(p) + eta) * g for p, g in zip(params, grads, strict=True)]
    norm = torch.stack([(g * g).sum() for g in grads]).sum().sqrt() if len(grads) else torch.zeros(())
    if found_inf is not None and not norm.isfinite():
        found_inf.fill_(1)
    return norm


def grad_norms(
    grad_groups: Sequence[Tensors],  # M groups of n tensors
    params: Tensors | None = None,  # n tensors
    *,
    adaptive: bool = False,
    eta: float = 0.0,
) -> Tensor:  # (M,)
    """:func:`grad_norm` of every group."""
    norms = [grad_norm(grads, params, adaptive=adaptive, eta=eta) for grads in grad_groups]
    return torch.stack(norms) if norms else torch.zeros(0)
