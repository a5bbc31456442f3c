"""Which directions, descent rules and base optimizers go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from sam_kernels._validate import describe
from sam_kernels.optim._batches.closures import TwoPasses
from sam_kernels.optim._part import FirstGradient, Part, Use
from sam_kernels.optim.descents import Descent
from sam_kernels.optim.directions import Direction

__all__ = ["check_family", "check_freezing", "check_gradient", "check_passes", "check_weighted"]


# Class attributes of earlier versions, by what a direction or a rule has in their place.
_REPLACED = {
    "sign": "override is_downhill()",
    "knows_maximize": "override is_downhill()",
    "begins_elsewhere": "set first_gradient = FirstGradient.ELSEWHERE",
    "needs_no_gradient": "set first_gradient = FirstGradient.NONE",
    "rewrites_descent": "override descent_norm(), which is enough",
    "is_scaled": "return PerturbOptions(is_scaled=False) from perturb_options()",
    "is_plain": "override rewrite() or leave it, which is enough",
    "needs_loss": "override check_loss(), which is enough",
    "needs_closure": "override refuses() and return True for Use.TWO_STEPS",
    "is_capturable": "override refuses() and return True for Use.CAPTURE",
    "can_clip": "override refuses() and return True for Use.CLIPPING",
    "makes_gradient": "override refuses() and return True for Use.BACKWARD",
}


def _check_attributes(part: Part) -> None:
    """Raises TypeError for an attribute of earlier versions that a user's own direction or rule still sets."""
    own = [vars(part) if hasattr(part, "__dict__") else {}, *map(vars, type(part).__mro__)]
    for namespace in own[: 1 + type(part).__mro__.index(Direction if isinstance(part, Direction) else Descent)]:
        for name in sorted(_REPLACED.keys() & namespace.keys()):
            raise TypeError(
                f"SAM: {type(part).__name__}.{name} is an attribute of earlier versions, which is no longer read; {_REPLACED[name]}"
            )


def check_family(direction: Any, descent: Any, base: Optimizer, *, clips: bool, capturable: bool) -> None:
    """Raises TypeError for a part of another type, ValueError for parts, base and options that have no meaning together."""
    if not isinstance(direction, Direction):
        raise TypeError(f"SAM: direction must be one of sam_kernels.optim.directions, such as Friendly(), got {describe(direction)}")
    if not isinstance(descent, Descent):
        raise TypeError(f"SAM: descent must be one of sam_kernels.optim.descents, such as Look(), got {describe(descent)}")
    for part in (direction, descent):
        _check_attributes(part)
        part.check_base(base)
    if direction.keeps_last_grads and not direction.keeps:
        raise TypeError(f"SAM: {type(direction).__name__}.keeps_last_grads is set, but its keeps names nothing to keep them under")
    if descent.keeps_grads and direction.first_gradient is not FirstGradient.AT_WEIGHTS:
        raise ValueError(f"SAM: descent {descent.name!r} needs the gradient at the weights; direction {direction.name!r} takes none")
    if descent.reflects and direction.rewrites:
        raise ValueError(
            f"SAM: descent {descent.name!r} has a third pass, whose gradient direction {direction.name!r} would not rewrite as it rewrites "
            "the others; use another direction"
        )
    if descent.reflects and capturable:
        raise ValueError(f"SAM: capturable=True: the third pass of descent {descent.name!r} has not been tried in a graph; leave it out")
    for part in (direction, descent):
        if clips and part.refuses(Use.CLIPPING):
            raise ValueError(f"SAM: max_grad_norm is not defined for {part.role} {part.name!r}")
        if capturable and part.refuses(Use.CAPTURE):
            raise ValueError(f"SAM: capturable=True, but what {part.name!r} does at a step is decided, or drawn, by the host")


def check_freezing(direction: Direction, descent: Descent, process_group: Any) -> None:
    """Raises ValueError where the first pass must give all parameters a gradient, or gives none."""
    if direction.first_gradient is FirstGradient.NONE:
        raise ValueError(f"SAM: freeze_unperturbed=True: direction {direction.name!r} takes no gradient before the ascent; leave it out")
    if descent.keeps_grads:
        raise ValueError(
            f"SAM: freeze_unperturbed=True: descent {descent.name!r} steps along the gradients of the first pass too, so it needs those of "
            "all parameters; leave freeze_unperturbed out"
        )
    for part in (direction, descent):
        if part.refuses(Use.FREEZING):
            raise ValueError(f"SAM: freeze_unperturbed=True is not defined for {part.role} {part.name!r}")
    if process_group is not None:
        raise ValueError(
            "SAM: freeze_unperturbed=True with process_group: a stage of a pipeline whose parameters are all frozen would have no graph; "
            "leave freeze_unperturbed out"
        )


def check_weighted(direction: Any, descent: Any) -> None:
    """Raises ValueError for a direction or a rule that cannot use RW-SAM's ascent gradient, which is weighted and taken at the weights."""
    if isinstance(direction, Direction) and direction.first_gradient is not FirstGradient.AT_WEIGHTS:
        raise ValueError(f"RWSAM: direction {direction.name!r} does not ascend along a gradient at the weights, so nothing can be weighted")
    if isinstance(descent, Descent) and descent.keeps_grads:
        raise ValueError(f"RWSAM: descent {descent.name!r} needs the plain gradient at the weights; the first pass makes the weighted one")


def check_passes(direction: Direction, descent: Descent, passes: Sequence[TwoPasses]) -> None:
    """Raises ValueError where several micro-batches, or a closure for the ascent alone, have no meaning."""
    if direction.first_gradient is FirstGradient.NONE and any(ascent is not following for ascent, following in passes):
        raise ValueError(f"SAM.step: direction {direction.name!r} takes no gradient before the ascent; ascent_closure has no use")
    count = len(passes)
    if count == 1:
        return
    if descent.rewrites:
        raise ValueError(f"SAM.step: descent {descent.name!r} is defined for one batch, not for {count} micro-batches")
    if direction.keeps or direction.first_gradient is FirstGradient.NONE:
        raise ValueError(f"SAM.step: direction {direction.name!r} is defined for one gradient a step, not for {count} micro-batches")


def check_gradient(direction: Direction, descent: Descent, made: int) -> None:
    """Raises ValueError where a step is more than SAM's gradient, added to others. ``made``: calls of ``backward`` since the last step."""
    if descent.reflects:
        raise ValueError(f"SAM.backward: descent {descent.name!r} has a third pass; call step(closure)")
    for part in (direction, descent):
        if part.refuses(Use.BACKWARD):
            raise ValueError(f"SAM.backward: {part.role} {part.name!r} chooses more than a gradient; call step(closure)")
    averages = direction.keeps[1:] if direction.keeps_last_grads else direction.keeps  # the others are the optimizer's, at the step
    if made and averages:
        raise ValueError(
            f"SAM.backward: direction {direction.name!r} keeps an average of one gradient a step; call backward once for each step"
        )
