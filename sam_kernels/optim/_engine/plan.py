"""What one step has decided before it writes anything: radius, mix and participation of every parameter group, each asked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from torch import Tensor
from torch.optim import Optimizer

from sam_kernels._validate import check_flag, check_number, plain_number
from sam_kernels.optim._types import ParamGroup
from sam_kernels.schedules._at_step import (
    FIRST_STEP,
    Step,
    beta_at,
    check_schedule,
    is_ascending,
    lambd_at,
    loss_for_radius,
    radius_at,
    resolved_at,
)
from sam_kernels.schedules._radius import AscentInfo, Radius

__all__ = ["GROUP_OPTIONS", "UNSCALED", "GroupPlan", "Scaling", "StepPlan", "check_options"]

GROUP_OPTIONS = ("rho", "lambd", "adaptive", "eta", "scale")  # SAM's options of a parameter group


class Scaling(TypedDict):
    """ASAM's normalisation of a group, as keywords of operations: T = |w| + eta where ``adaptive``, otherwise 1."""

    adaptive: bool
    eta: float


UNSCALED: Scaling = {"adaptive": False, "eta": 0.0}
MAX_SCALE = 1e9  # its square times a norm of 1e20 is a float32


@dataclass(slots=True)
class GroupPlan:
    """The ascent of one parameter group in one step."""

    group: ParamGroup
    t: Step
    rho: float | Tensor | Radius  # a Radius: asked when the norm is known
    lambd: float | Tensor
    scaling: Scaling
    scale: float  # of the group: T is multiplied by it, in no kernel
    maximize: bool
    participates: bool
    options: tuple[Any, ...]  # as the group holds them
    is_constant: bool  # all of them are numbers

    @property
    def never_ascends(self) -> bool:
        """Whether the radius is the number 0, in this step and the next."""
        rho = self.options[0]
        return isinstance(rho, int | float) and rho == 0

    def scaled(self, rho: float | Tensor) -> float | Tensor:
        """What ``perturb_`` is given for ρ_t: ρ_t ``scale``², with which it makes ρ (…) T² d of a norm ‖T d‖."""
        return rho if self.scale == 1.0 else rho * self.scale**2

    def radius(self, norm: Tensor, grad_scale: Tensor | None, loss: Any) -> float | Tensor:  # norm: ()
        """ρ_t. ``norm`` is that of the gradients as they are, multiplied by ``grad_scale`` where that is given."""
        if not isinstance(self.rho, Radius):
            return self.rho
        unscaled = norm if grad_scale is None else norm / grad_scale.to(norm.device)
        return radius_at(self.rho, AscentInfo(self.t, self.group, unscaled, loss_for_radius(loss)))


class StepPlan:
    """Step t of all groups. ``groups`` has a :class:`GroupPlan` for each; ``raw`` the options that it was made from."""

    def __init__(
        self,
        groups: Sequence[ParamGroup],
        keys: Mapping[str, str],
        base: Optimizer,
        *,
        ahead: bool,
        last: StepPlan | None = None,
        have_others: bool = False,
    ) -> None:
        """``ahead``: the plan of the step after the one that the groups count. ``last``: an earlier one; groups whose options are the same
        numbers as there are not checked again. ``have_others``: other ranks may have parameters of a group that has none here.

        Raises: TypeError or ValueError for an option that is none.
        """
        self.raw = _raw(groups, keys)
        self.groups: list[GroupPlan] = []
        for i, group in enumerate(groups):
            t: Step = group[keys["sam_step"]]
            before = last.groups[i] if last is not None and i < len(last.groups) else None
            self.groups.append(_planned(group, keys, base, t + 1 if ahead else t, before))
        self.ascends = any(each.participates or (have_others and is_ascending(each.rho)) for each in self.groups)
        self.observer: Any = _observer(self.groups)
        self.has_scales = any(each.scale != 1.0 for each in self.groups)
        self._beta_key = keys.get("beta")
        self._beta: float | Tensor | None = None

    def is_of(self, groups: Sequence[ParamGroup], keys: Mapping[str, str]) -> bool:
        """Whether the groups still have the options that this plan was made from."""
        raw = _raw(groups, keys)
        return len(raw) == len(self.raw) and all(map(_is_same, raw, self.raw))

    @property
    def beta(self) -> float | Tensor:
        """β_t of RW-SAM, asked when it is first needed. The groups hold one value (the optimizer sees to that)."""
        if self._beta is None:
            assert self._beta_key is not None
            first = self.groups[0]
            self._beta = beta_at(first.group[self._beta_key], first.t)
        return self._beta


def check_options(values: ParamGroup, keys: Mapping[str, str], *, capturable: bool) -> None:
    """Checks SAM's options in a group, or in a checkpoint of one; NumPy's numbers become Python's. Raises TypeError or ValueError."""
    first_step = FIRST_STEP if capturable else 1
    for name in ("rho", "lambd", "beta"):
        key = keys.get(name)
        if key in values:
            values[key] = plain_number(values[key])
            check_schedule(name, values[key], first_step)
    values[keys["eta"]] = _checked_scaling(values[keys["adaptive"]], values[keys["eta"]])["eta"]
    values[keys["scale"]] = _checked_scale(values[keys["scale"]])


def _checked_scaling(adaptive: Any, eta: Any) -> Scaling:
    return {"adaptive": check_flag("SAM", "adaptive", adaptive), "eta": check_number("SAM", "eta", eta, low=0.0)}


def _checked_scale(scale: Any) -> float:
    return check_number("SAM", "scale", scale, low=0.0, high=MAX_SCALE)


def _raw(groups: Sequence[ParamGroup], keys: Mapping[str, str]) -> list[Any]:
    return [group[key] for group in groups for key in keys.values()]


def _is_same(left: Any, right: Any) -> bool:
    return left is right or (isinstance(left, int | float) and type(left) is type(right) and left == right)


def _observer(groups: Sequence[GroupPlan]) -> Any:
    """The radius that decides by the norms of all steps, None without one. Raises ValueError where another group ascends by another."""
    observers = [each.options[0].observer if isinstance(each.options[0], Radius) else None for each in groups]
    found = next((each for each in observers if each is not None), None)
    if found is None:
        return None
    for i, (group, observer) in enumerate(zip(groups, observers, strict=True)):
        if observer is not found and not group.never_ascends:
            raise ValueError(
                f"SAM: param_groups[{i}] has another radius than the {type(found).__name__} of other groups, which decides for all that "
                "ascend; give all of them the same object, or the number 0"
            )
    return found


def _maximizes(group: ParamGroup, base: Optimizer) -> bool:
    """Some optimizers keep the option for themselves, for all groups."""
    return bool(group.get("maximize", getattr(base, "maximize", False)))


def _planned(group: ParamGroup, keys: Mapping[str, str], base: Optimizer, t: Step, before: GroupPlan | None) -> GroupPlan:
    rho, lambd, adaptive, eta, scale, has_params = options = (*(group[keys[name]] for name in GROUP_OPTIONS), len(group["params"]) > 0)
    if before is not None and before.is_constant and before.group is group and before.options == options:
        known = before.rho, before.lambd, before.scaling, before.scale
        return GroupPlan(group, t, *known, _maximizes(group, base), before.participates, options, True)
    resolved = resolved_at(rho, t)
    return GroupPlan(
        group,
        t,
        resolved,
        lambd_at(lambd, t),
        _checked_scaling(adaptive, eta),
        _checked_scale(scale),
        _maximizes(group, base),
        has_params and is_ascending(resolved),
        options,
        all(type(option) in (float, int, bool) for option in options),
    )
