"""The gradients of a step's last pass, kept for the ascent of the next step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_kernels import functional
from sam_kernels.optim._engine.capturable import is_recording, not_recordable
from sam_kernels.optim._engine.lists import GroupGrads, same_layout
from sam_kernels.optim._engine.memory import ParamMemory
from sam_kernels.optim._engine.ownership import take_over
from sam_kernels.optim._engine.plan import StepPlan

__all__ = ["LastGrads"]


class LastGrads:
    """Keeps them in ``memory`` under ``name``: without the loss scale, before clipping. A parameter without a gradient has nothing kept,
    and so has a group whose radius is the number 0.

    Memory: N s. Bytes: none where a gradient can be taken over, 2 N s for a copy, 3 N s for one that is divided by the loss scale.

    Args:
        is_fixed: keep them where the last ones were, which a CUDA graph reads at every replay; nothing is then taken over.
    """

    def __init__(self, memory: ParamMemory, name: str, *, is_fixed: bool) -> None:
        self._memory, self._name, self._is_fixed = memory, name, is_fixed

    def keep(self, plan: StepPlan, grad_scale: Tensor | None, hand_over: bool, group_grads: Sequence[GroupGrads], is_left: bool) -> None:
        """Keeps the gradients as they are now, divided by ``grad_scale`` where that is given.

        ``hand_over``: one that nobody else has is kept without a copy, and is no longer its parameter's ``grad``. ``is_left``: nothing
        writes it later in the step.
        """
        takes = hand_over and is_left and grad_scale is None and not self._is_fixed
        group_grads = [current for current in group_grads if not plan.groups[current.index].never_ascends]
        found = []
        for current in group_grads:
            ours = take_over(current.lists.owners, current.grads) if takes else [False] * len(current.grads)
            found.append((current.lists, current.grads if all(ours) else self._with_copies(current, ours, grad_scale)))
        self._memory.put_all(self._name, found)

    def _with_copies(self, current: GroupGrads, ours: list[bool], grad_scale: Tensor | None) -> list[Tensor]:
        """The gradients that are ours, and copies of the others: where those of the last step were, if they fit."""
        kept = list(current.grads)
        before = self._memory.of(self._name, current.lists)
        others = [i for i, is_ours in enumerate(ours) if not is_ours]
        for i in others:
            place, grad = before[i], current.grads[i]
            if place is None or not same_layout(place, grad):
                if is_recording(grad.device):
                    raise not_recordable(
                        "no gradient of an earlier step is kept in this place; make an eager step with all gradients first"
                    )
                place = torch.empty_like(grad)
            kept[i] = place
        copies, originals = [kept[i] for i in others], [current.grads[i] for i in others]
        if grad_scale is None:
            functional.restore_(copies, originals)
        else:
            weight = 1.0 / grad_scale.to(torch.float64)
            functional.combine_(copies, originals, originals, left_weight=weight, right_weight=0.0)
        return current.lists.grads(kept)

    def note(self, found_inf: Tensor) -> None:  # ()
        """Notes on the device whether the step they are of is skipped: the host does not wait."""
        spoiled = self._memory.spoiled
        if spoiled is None or spoiled.device != found_inf.device:
            self._memory.spoiled = found_inf.clone()
        else:
            spoiled.copy_(found_inf)
