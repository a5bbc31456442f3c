"""Directions made of the gradient and a moving average of earlier ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_kernels.backends.foreach._rows import arithmetic_dtypes, joined_norm, norms_of, number_of, scale_, wide, widen, write
from sam_kernels.operations import DirectionNorm, Operands, Perturb

__all__ = ["direction_norm_", "weighted_directions"]


def weighted_directions(op: Perturb, lists: Operands, dtypes: Sequence[torch.dtype], inverse: Tensor | float) -> list[Tensor]:
    """grad_weight inverse g + ema_weight m in the arithmetic type. g is left out where its weight is 0: it may not be finite."""
    averages = widen(lists["ema"], dtypes, copy=True)
    torch._foreach_mul_(averages, op.ema_weight)
    if op.grad_weight != 0:
        scaled = widen(lists["grads"], dtypes, copy=True)
        factor = op.grad_weight * inverse
        scale_(scaled, factor if isinstance(factor, float) else number_of(factor))
        torch._foreach_add_(averages, scaled)
    return averages


def direction_norm_(op: DirectionNorm, lists: Operands) -> Tensor:  # () float64
    """See :class:`sam_kernels.operations.DirectionNorm`."""
    ema, dtypes = lists["ema"], arithmetic_dtypes(op, lists)
    scaled = widen(lists["grads"], dtypes, copy=op.grad_scale is not None)
    if op.grad_scale is not None:
        scale_(scaled, number_of(1.0 / wide(op.grad_scale)))
    before = [torch.zeros_like(grad) for grad in scaled] if op.first_step else widen(ema, dtypes)
    if op.first_step:
        after = directions = scaled
    else:
        after = list(torch._foreach_add(torch._foreach_mul(before, op.decay), scaled, alpha=op.gain))
        directions = list(torch._foreach_add(scaled, before, alpha=-op.sigma)) if op.kind == "friendly" else after
    # What is not finite stays out of the averages and shows in the norm.
    write(ema, [torch.where(torch.isfinite(g), a, b) for g, a, b in zip(scaled, after, before, strict=True)], None)
    return joined_norm(norms_of(op, directions, lists))
