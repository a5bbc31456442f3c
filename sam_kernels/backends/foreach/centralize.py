"""Gradients less their means over all dimensions but the first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_kernels._flags import report_norm
from sam_kernels.backends.foreach._rows import arithmetic_dtypes, widen, write

__all__ = ["centralize_"]


def centralize_(
    grads: Sequence[Tensor],
    params: Sequence[Tensor] | None,
    slice_sizes: Sequence[int],  # n: 0 for a tensor that is left as it is
    *,
    adaptive: bool,
    eta: float,
    found_inf: Tensor | None,
) -> Tensor:  # () float32, float64 where a gradient is float64
    """See :func:`sam_kernels.functional.centralize_`."""
    used = params if adaptive else None
    directions = widen(grads, arithmetic_dtypes(grads, used))
    for i, size in enumerate(slice_sizes):
        if size > 0:
            g = directions[i]
            directions[i] = g - g.mean(dim=tuple(range(1, g.dim())), keepdim=True, dtype=torch.float64).to(g.dtype)
            write([grads[i]], [directions[i]], None)
    terms = [direction.to(torch.float64) for direction in directions]
    if used is not None:
        weights = torch._foreach_abs([p.to(torch.float64) for p in used])
        torch._foreach_add_(weights, eta)
        terms = list(torch._foreach_mul(weights, terms))
    dtype = torch.float64 if any(grad.dtype is torch.float64 for grad in grads) else torch.float32
    return report_norm(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(terms))).to(dtype), found_inf, None, None)
