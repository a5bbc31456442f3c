"""Norms of every step's gradient, for a radius that decides by them which steps ascend."""

from __future__ import annotations

from torch import Tensor

from sam_kernels.optim._engine.passes import Passes
from sam_kernels.optim._engine.plan import StepPlan
from sam_kernels.optim.directions import Direction

__all__ = ["check_observed", "check_observer", "observe"]


def check_observer(plan: StepPlan, direction: Direction, *, ascends_locally: bool, is_weighted: bool) -> None:
    """Raises ValueError where an ascent has another norm than the gradient of a plain step, or another one on each rank."""
    if plan.observer is None:
        return
    name, kind = type(plan.observer).__name__, type(direction)
    if kind.norm is not Direction.norm or kind.group_grads is not Direction.group_grads:
        raise ValueError(f"SAM: {name} decides by the gradient's norm, and direction {direction.name!r} has another; use SAM's direction")
    if is_weighted:
        raise ValueError(
            f"RWSAM: {name} decides by the gradient's norm, and that of the first pass is weighted in some steps only; use SAM"
        )
    if ascends_locally:
        raise ValueError(f"SAM: {name} with a local ascent: each rank would decide by a norm of its own; leave local_ascent out")


def check_observed(plan: StepPlan, is_one_gradient: bool) -> None:
    """Raises ValueError where the ascents of a step follow other gradients than a plain step has."""
    if plan.observer is not None and not is_one_gradient:
        raise ValueError(
            f"SAM: {type(plan.observer).__name__} decides by the norm of one gradient a step; give one closure, without micro-batches or "
            "ascent_closure, and call backward once a step"
        )


def observe(passes: Passes, plan: StepPlan, grad_scale: Tensor | None) -> None:
    """Shows ``plan.observer`` the norm of the gradients as they are, without their scale: 1 N s, with ``adaptive`` 2."""
    group_grads = passes.lists.group_grads([each.group for each in plan.groups])
    norm = passes.norm([each for each in group_grads if not plan.groups[each.index].never_ascends], normalised=True)
    plan.observer.observe(plan.groups[0].t, norm if grad_scale is None else norm / grad_scale.to(norm.device))
