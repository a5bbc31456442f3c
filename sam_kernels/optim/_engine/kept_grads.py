"""The gradients of the first pass, for descent rules that need them beside those of the second."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_kernels import functional
from sam_kernels._tensor_list import TensorList
from sam_kernels.optim._engine.lists import Copies, GroupGrads, GroupLists, Key
from sam_kernels.optim._engine.ownership import take_over

__all__ = ["KeptGrads"]


class KeptGrads:
    """Until the descent: N s of memory, and no bytes moved where the gradients can be taken over (else a copy, 2 N s)."""

    def __init__(self) -> None:
        self._kept: dict[Key, tuple[GroupLists, list[Tensor]]] = {}
        self._are_scaled = False
        self._copies = Copies()
        self._described: dict[Key, tuple[GroupLists, TensorList]] = {}  # by group: copies of all its gradients

    def keep(self, group_grads: Sequence[GroupGrads], *, hand_over: bool, are_scaled: bool = False) -> None:
        """Keeps the gradients as they are. ``hand_over``: one that nobody else has is no longer its parameter's ``grad``, where the second
        pass would write it. ``are_scaled``: they are multiplied by a known loss scale."""
        self._are_scaled = are_scaled
        used = {current.key: current.lists for current in group_grads}  # other lists' parameters may be gone
        self._described = {i: each for i, each in self._described.items() if used.get(i) is each[0]}
        self._kept = {current.key: (current.lists, self._keep(current, hand_over)) for current in group_grads}

    def _keep(self, current: GroupGrads, hand_over: bool) -> list[Tensor]:
        params, grads = current.lists.params, current.grads
        ours = take_over(current.lists.owners, grads) if hand_over else [False]
        if not any(ours):
            copies = self._copies_of(current)
            functional.restore_(copies, grads)
            return copies
        others = [i for i, is_ours in enumerate(ours) if not is_ours]
        kept, copied = list(grads), [grads[i] for i in others]
        for i, copy in zip(others, self._copies.of([params[i] for i in others], copied), strict=True):
            kept[i] = copy
        if others:
            functional.restore_([kept[i] for i in others], copied)
        return current.lists.grads(kept)

    def _copies_of(self, current: GroupGrads) -> list[Tensor]:
        """Memory for a copy of every gradient, described once for as long as these lists describe the group."""
        lists, grads = current.lists, current.grads
        described_for, known = self._described.get(current.key, (None, TensorList()))
        is_known = described_for is lists and isinstance(grads, TensorList)  # both lists in the parameters' memory order
        if is_known and [copy.dtype for copy in known] == [grad.dtype for grad in grads]:
            return known
        copies = lists.grads(self._copies.of(lists.params, grads))
        if isinstance(copies, TensorList):
            self._described[current.key] = lists, copies
        return copies

    def of(self, current: GroupGrads) -> list[Tensor]:
        """One for each parameter of ``current``: zeros for one that had no gradient in the first pass."""
        known = self._kept.get(current.key)
        if known is not None and known[0] is current.lists:
            return known[1]
        kept = {} if known is None else dict(zip(known[0].params, known[1], strict=True))
        zeros = (torch.zeros_like(grad) for grad in current.grads)
        return current.lists.grads([kept.get(param, zero) for param, zero in zip(current.lists.params, zeros, strict=True)])

    def check_scale(self, are_scaled: bool) -> None:
        """Raises RuntimeError where only one pass has gradients multiplied by a known loss scale: no rule can put them together."""
        if self._kept and are_scaled is not self._are_scaled:
            scaled, other = ("second", "first") if are_scaled else ("first", "second")
            raise RuntimeError(
                f"SAM: the {scaled} pass was given a loss scale, the {other} one was not, and the step is made of the gradients of both; "
                "give grad_scaler to first_step and the scale to the second step, or unscale the gradients of both passes"
            )

    def forget(self) -> None:
        """The step is over. Copies are kept for the next."""
        self._kept = {}

    def release(self) -> None:
        """Frees the copies."""
        self._kept, self._copies, self._described = {}, Copies(), {}
