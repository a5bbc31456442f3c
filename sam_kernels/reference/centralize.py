"""Gradient centralisation and the norm of what it leaves.

Sources: Gradient Centralization (arXiv 2004.01461), which subtracts the mean of each output channel's weights; GCSAM, which takes the
centralised gradient for SAM's direction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["centralize_", "centralized"]


def centralized(g: Tensor) -> Tensor:  # any shape
    """g less its mean over all dimensions but the first; g itself with fewer than two dimensions."""
    return g if g.dim() < 2 else g - g.mean(dim=tuple(range(1, g.dim())), keepdim=True)


def centralize_(
    grads: Sequence[Tensor],  # n tensors
    params: Sequence[Tensor] | None = None,  # n tensors
    *,
    adaptive: bool = False,
    eta: float = 0.0,
    found_inf: Tensor | None = None,  # ()
) -> Tensor:  # ()
    """g <- :func:`centralized` g, and sqrt(sum g^2), or sqrt(sum (T g)^2), T = |p| + eta, when ``adaptive``."""
    squares = [torch.zeros((), dtype=torch.float64)]
    for i, g in enumerate(grads):
        d = centralized(g)
        g.copy_(d)
        if adaptive:
            assert params is not None
            d = (abs(params[i]) + eta) * d
        squares.append((d * d).sum())
    norm = torch.stack(squares).sum().sqrt()
    if found_inf is not None and not norm.isfinite():
        found_inf.fill_(1)
    return norm
