"""Norms over the parameter groups of the step under way, and what they report on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sam_kernels import functional
from sam_kernels.optim._engine.kept_lists import KeptLists
from sam_kernels.optim._engine.lists import GroupGrads, GroupLists
from sam_kernels.optim._engine.plan import UNSCALED, Scaling, StepPlan
from sam_kernels.optim._engine.skipped import SkippedSteps

__all__ = ["Norms"]

Norm = Tensor | tuple[GroupLists, Tensor]  # () alone, or with the lists that it is of


class Norms:
    """``plan`` is that of the step under way, None in a plain step of the base."""

    def __init__(self, lists: KeptLists) -> None:
        self.lists = lists
        self.skips = SkippedSteps()
        self.plan: StepPlan | None = None
        self._told_norm: Tensor | None = None  # () the last norm that has told found_inf of itself

    @property
    def ascent_plan(self) -> StepPlan:
        """The plan of a step that is not the base's alone."""
        assert self.plan is not None
        return self.plan

    @property
    def found_inf(self) -> Tensor:  # () float32
        """Set once a gradient of either pass was not finite. On the device."""
        return self.skips.found_inf

    def norm(self, group_grads: list[GroupGrads], *, normalised: bool, within_replica: bool = False) -> Tensor:
        """Global norm over the groups, each with its own adaptive normalisation where ``normalised``; marks ``found_inf``."""
        norms = []
        for lists, grads, scaling in self.joined(group_grads, normalised=normalised):
            skipped = self.skips.skipped if self.skips.is_of_last_step else None
            functional.grad_norm_(lists.norm, grads, lists.weights, found_inf=self.found_inf, skipped=skipped, **scaling)
            self.skips.is_of_last_step = False
            norms.append((lists, lists.norm))
        norm = self.combined(self.scaled(norms) if normalised else norms, within_replica=within_replica)
        if norms and not (normalised and self.ascent_plan.has_scales):  # a product may overflow where the norms have not
            self._told_norm = norm
        return norm

    def scaled(self, norms: Sequence[Norm]) -> Sequence[Norm]:
        """Norms ‖T d‖ of lists whose groups have a ``scale``, which no operation multiplies T by.

        Raises TypeError for a norm without its lists where a group has a scale.
        """
        plan = self.ascent_plan
        if not plan.has_scales:
            return norms
        found: list[Norm] = []
        for each in norms:
            if isinstance(each, Tensor):
                raise TypeError("SAM: a group has a scale, and AscentStep.combined was given a norm alone; give (lists, norm)")
            lists, norm = each
            scale = plan.groups[self.lists.index_of(lists)].scale
            found.append((lists, norm if scale == 1.0 else norm * scale))
        return found

    def _check_finite(self, group_grads: list[GroupGrads]) -> None:
        """Marks ``found_inf``. Lists of all groups' gradients together end here: they would count as somebody who has the gradients."""
        for _, grads, *_ in self.joined(group_grads, normalised=False):
            functional.check_finite_(grads, self.found_inf)

    def combined(self, norms: Sequence[Norm], *, within_replica: bool = False) -> Tensor:  # ()
        """The norm over all elements out of norms of lists; 0 of none. Of DTensors it is that of all ranks, and tells ``found_inf``;
        ``within_replica``: of the ranks that together hold one copy."""
        if self.lists.shards:
            self.skips.forget_last_step()  # where no norm has seen to that
            shards = self.lists.shards
            parts = [(shards.only_layout, each) if isinstance(each, Tensor) else (each[0].layout, each[1]) for each in norms]
            norm = self._told_norm = shards.norm(parts, self.found_inf.device, within_replica=within_replica)
            if not norm.is_cpu or not math.isfinite(norm.item()):
                self.found_inf.logical_or_(~norm.isfinite())
            return norm
        found = [each if isinstance(each, Tensor) else each[1] for each in norms]
        if not found:
            return torch.zeros((), dtype=torch.float32, device=self.found_inf.device)
        return found[0] if len(found) == 1 else functional.combine_norms(found)

    def joined(self, group_grads: list[GroupGrads], *, normalised: bool) -> list[tuple[GroupLists, list[Tensor], Scaling]]:
        """Lists, gradients and scaling of the norms to take: one norm of all groups where they agree and one call can take them."""
        if len(group_grads) == 1:
            only = group_grads[0]
            return [(only.lists, only.grads, self.ascent_plan.groups[only.index].scaling if normalised else UNSCALED)]
        plans = [self.ascent_plan.groups[each.index] for each in group_grads] if normalised else []
        scalings = [each.scaling for each in plans] if normalised else [UNSCALED for _ in group_grads]
        are_alike = all(each.scaling == plans[0].scaling and each.scale == plans[0].scale for each in plans[1:])
        together = self.lists.joined(group_grads) if are_alike else None
        if together is not None:
            return [(*together, scalings[0])]
        return [(each.lists, each.grads, scaling) for each, scaling in zip(group_grads, scalings, strict=True)]
