"""The gradients of the first pass, for descent rules that need them beside those of the second."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sam_kernels import functional
from sam_kernels._tensor_list import TensorList
from sam_kernels.optim._engine.lists import GroupGrads, GroupLists, Key
from sam_kernels.optim._engine.ownership import nobody_else_has
from sam_kernels.optim._shards.layout import WHOLE

__all__ = ["KeptGrads"]


class KeptGrads:
    """Until the descent: N s of memory, and no bytes moved where the gradients can be taken over (else a copy, 2 N s)."""

    def __init__(self) -> None:
        self._kept: dict[Key, tuple[GroupLists, list[Tensor]]] = {}
        self._are_scaled = False
        self._copies: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()  # a copy goes with its parameter
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
        ours = _taken_over(params, grads) if hand_over and current.lists.layout is WHOLE else [False]  # FSDP2: views of one buffer
        if not any(ours):
            copies = self._copies_of(current)
            functional.restore_(copies, grads)
            return copies
        rows = list(zip(params, grads, ours, strict=True))
        kept = [grad if is_ours else self._copy_of(param, grad) for param, grad, is_ours in rows]
        copied = [(copy, grad) for copy, (_, grad, is_ours) in zip(kept, rows, strict=True) if not is_ours]
        if copied:
            functional.restore_([copy for copy, _ in copied], [grad for _, grad in copied])
        return current.lists.grads(kept)

    def _copies_of(self, current: GroupGrads) -> list[Tensor]:
        """Memory for a copy of every gradient, described once for as long as these lists describe the group."""
        lists, grads = current.lists, current.grads
        described_for, known = self._described.get(current.key, (None, TensorList()))
        is_known = described_for is lists and isinstance(grads, TensorList)  # both lists in the parameters' memory order
        if is_known and [copy.dtype for copy in known] == [grad.dtype for grad in grads]:
            return known
        copies = lists.grads([self._copy_of(param, grad) for param, grad in zip(lists.params, grads, strict=True)])
        if isinstance(copies, TensorList):
            self._described[current.key] = lists, copies
        return copies

    def _copy_of(self, param: Tensor, grad: Tensor) -> Tensor:
        copy = self._copies.get(param)
        if copy is None or copy.dtype != grad.dtype or copy.device != grad.device or copy.stride() != grad.stride():
            copy = self._copies[param] = torch.empty_like(grad, requires_grad=False)
        return copy

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
        self._kept, self._copies, self._described = {}, WeakTensorKeyDictionary(), {}


def _taken_over(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[bool]:
    """Which of the gradients nobody else has: they are no longer their parameter's ``grad``."""
    for param in params:
        param.grad = None
    ours = nobody_else_has(grads)
    for param, grad, is_ours in zip(params, grads, ours, strict=True):
        if not is_ours:
            param.grad = grad
    return ours
