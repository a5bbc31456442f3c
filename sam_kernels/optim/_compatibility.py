"""Which directions, descent rules and base optimizers go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from sam_kernels._validate import describe
from sam_kernels.optim._batches.closures import TwoPasses
from sam_kernels.optim.descents import Descent
from sam_kernels.optim.directions import Direction

__all__ = ["check_family", "check_gradient", "check_passes", "check_weighted"]


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


def check_weighted(direction: Any, descent: Any) -> None:
    """Raises ValueError for what cannot be made of RW-SAM's ascent gradient, which is a weighted one, taken at the weights."""
    if isinstance(direction, Direction) and (direction.begins_elsewhere or direction.needs_no_gradient):
        raise ValueError(f"RWSAM: direction {direction.name!r} does not ascend along a gradient at the weights, so nothing can be weighted")
    if isinstance(descent, Descent) and descent.keeps_grads:
        raise ValueError(f"RWSAM: descent {descent.name!r} needs the plain gradient at the weights; the first pass makes the weighted one")


def check_passes(direction: Direction, descent: Descent, passes: Sequence[TwoPasses]) -> None:
    """Raises ValueError where several micro-batches, or a closure for the ascent alone, have no meaning."""
    if direction.needs_no_gradient and any(ascent is not following for ascent, following in passes):
        raise ValueError(f"SAM.step: direction {direction.name!r} takes no gradient before the ascent; ascent_closure has no use")
    count = len(passes)
    if count == 1:
        return
    if not descent.is_plain:
        raise ValueError(f"SAM.step: descent {descent.name!r} is defined for one batch, not for {count} micro-batches")
    if direction.keeps or direction.needs_no_gradient:
        raise ValueError(f"SAM.step: direction {direction.name!r} is defined for one gradient a step, not for {count} micro-batches")


def check_gradient(direction: Direction, descent: Descent, made: int) -> None:
    """Raises ValueError where SAM's gradient alone, to be added to others, is not what the method steps along. ``made``: how many were
    made since the last step."""
    if not descent.makes_gradient:
        raise ValueError(f"SAM.backward: descent {descent.name!r} chooses more than a gradient; call step(closure)")
    if made and direction.keeps:
        raise ValueError(
            f"SAM.backward: direction {direction.name!r} keeps an average of one gradient a step; call backward once for each step"
        )
