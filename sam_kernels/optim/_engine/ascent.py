"""What a direction makes of the gradients, as the passes take it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sam_kernels._validate import describe
from sam_kernels.optim._engine.ascent_step import AscentStep
from sam_kernels.optim._engine.lists import GroupGrads
from sam_kernels.optim._engine.passes import Ascent
from sam_kernels.optim.directions import Direction

__all__ = ["ascent_of"]


def ascent_of(direction: Direction, step: AscentStep, grad_scale: Tensor | None) -> tuple[list[GroupGrads], Ascent]:
    """What the direction was made from, by group, and the ascent of the groups that participate. Raises TypeError for a norm that is
    none."""
    group_grads = direction.group_grads(step)
    participating = [each for each in group_grads if step.options(each).participates]
    norm: Any = direction.norm(step, participating, grad_scale)
    if not isinstance(norm, Tensor) or norm.numel() != 1 or not norm.is_floating_point():
        raise TypeError(f"SAM: {type(direction).__name__}.norm must return a floating-point tensor of one element, got {describe(norm)}")
    ascent = Ascent(
        group_grads=participating,
        norm=norm,
        options=[direction.perturb_options(step, each) for each in participating],
        is_downhill=direction.sign < 0,
        is_scaled=direction.is_scaled,
        knows_maximize=direction.knows_maximize,
    )
    return group_grads, ascent
