"""Inner products and weighted sums of two lists of tensors: what the descent rules of the SAM family are made of.

Sources: GSAM (arXiv 2203.08065), LookSAM (arXiv 2203.02714), WSAM (arXiv 2305.15817), SAM-SPS, and RSAM, which takes the difference of
weights perturbed at random and those saved for a part of its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_kernels.reference.norms import grad_norm

__all__ = ["combine_", "combined", "differences", "grad_dots"]


def combined(
    left: Tensor,  # any shape
    right: Tensor,  # the shape of left
    origin: Tensor | None,  # the shape of left
    *,
    left_weight: float,
    right_weight: float,
    origin_weight: float = 0.0,
) -> Tensor:
    """a l + (b r + c o). The parentheses are part of it: with b = 1 and c = -1 the difference of two close weights is exact."""
    right = right_weight * right
    return left_weight * left + (right if origin is None else right + origin_weight * origin)


def differences(rights: Sequence[Tensor], origins: Sequence[Tensor] | None) -> list[Tensor]:
    """d = r - o, or r itself."""
    return list(rights) if origins is None else [r - o for r, o in zip(rights, origins, strict=True)]


def grad_dots(
    lefts: Sequence[Tensor],  # n tensors
    rights: Sequence[Tensor],  # n tensors
    origins: Sequence[Tensor] | None = None,  # n tensors
    *,
    found_inf: Tensor | None = None,  # ()
) -> Tensor:  # (3,) float64
    """(sum l^2, sum l d, sum d^2) with d of :func:`differences`."""
    sums = torch.zeros(3, dtype=torch.float64)
    for left, d in zip(lefts, differences(rights, origins), strict=True):
        sums += torch.stack([(left * left).sum(), (left * d).sum(), (d * d).sum()])
    if found_inf is not None and not sums.isfinite().all():
        found_inf.fill_(1)
    return sums


def combine_(
    outs: Sequence[Tensor],  # n tensors
    lefts: Sequence[Tensor],  # n tensors
    rights: Sequence[Tensor],  # n tensors
    origins: Sequence[Tensor] | None = None,  # n tensors
    *,
    left_weight: float,
    right_weight: float,
    origin_weight: float = 0.0,
    found_inf: Tensor | None = None,  # ()
) -> Tensor:  # ()
    """out <- :func:`combined`, unless ``found_inf`` is set, and the norm of that. ``outs`` may be the tensors of another list."""
    keeps = found_inf is not None and bool(found_inf != 0)
    results = []
    for i, (out, left, right) in enumerate(zip(outs, lefts, rights, strict=True)):
        origin = None if origins is None else origins[i]
        results.append(combined(left, right, origin, left_weight=left_weight, right_weight=right_weight, origin_weight=origin_weight))
        if not keeps:
            out.copy_(results[-1])
    return grad_norm(results, found_inf=found_inf)
