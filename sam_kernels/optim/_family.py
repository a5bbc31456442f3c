"""Which directions, descent rules and base optimizers go together."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from sam_kernels._validate import describe
from sam_kernels.optim.descents import Descent
from sam_kernels.optim.directions import Direction

__all__ = ["check_family", "check_micro_batches"]


def check_family(direction: Any, descent: Any, base: Optimizer, *, clips: bool, capturable: bool) -> None:
    """Raises TypeError for what is no direction or no rule, ValueError for what does not go together."""
    if not isinstance(direction, Direction):
        raise TypeError(f"SAM: direction must be one of sam_kernels.optim.directions, such as Friendly(), got {describe(direction)}")
    if not isinstance(descent, Descent):
        raise TypeError(f"SAM: descent must be one of sam_kernels.optim.descents, such as Look(), got {describe(descent)}")
    direction.check_base(base)
    descent.check_base(base)
    if descent.keeps_grads and (direction.begins_elsewhere or direction.needs_no_gradient):
        raise ValueError(f"SAM: descent {descent.name!r} needs the gradient at the weights; direction {direction.name!r} takes none")
    if clips and not descent.can_clip:
        raise ValueError(f"SAM: max_grad_norm is not defined for descent {descent.name!r}")
    for part in (direction, descent):
        if capturable and not part.is_capturable:
            raise ValueError(f"SAM: capturable=True, but what {part.name!r} does at a step is decided, or drawn, by the host")


def check_micro_batches(direction: Direction, descent: Descent, count: int) -> None:
    """Raises ValueError where several micro-batches have no meaning."""
    if count == 1:
        return
    if not descent.is_plain:
        raise ValueError(f"SAM.step: descent {descent.name!r} is defined for one batch, not for {count} micro-batches")
    if direction.keeps or direction.needs_no_gradient:
        raise ValueError(f"SAM.step: direction {direction.name!r} is defined for one gradient a step, not for {count} micro-batches")
