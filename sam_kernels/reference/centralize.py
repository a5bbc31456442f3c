"""Gradient centralisation and the norm of what it leaves.

Sources: Gradient Centralization (arXiv 2004.01461), which subtracts the mean of each output channel's weights; GCSAM, which takes the
centralised gradient for SAM's direction.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sam_kernels.reference.norms import grad_norm

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
    """g <- :func:`centralized` g, and the norm of that (:func:`grad_norm`)."""
    results = [centralized(g) for g in grads]
    for g, result in zip(grads, results, strict=True):
        g.copy_(result)
    return grad_norm(results, params, adaptive=adaptive, eta=eta, found_inf=found_inf)
