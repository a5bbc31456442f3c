"""The gradients of the first pass, for descent rules that need them beside those of the second."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_kernels import functional
from sam_kernels.optim._group import Current, GroupLists
from sam_kernels.optim._ownership import nobody_else_has

__all__ = ["KeptGrads"]


class KeptGrads:
    """Until the descent: N s of memory, and no bytes moved where the gradients can be taken over (else a copy, 2 N s)."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[GroupLists, list[Tensor]]] = {}
        self._copies: dict[Tensor, Tensor] = {}

    def keep(self, currents: Sequence[Current], *, hand_over: bool) -> None:
        """Keeps the gradients as they are. ``hand_over``: one that nobody else has is no longer its parameter's ``grad``, where the second
        pass would write it."""
        self._kept = {current.index: (current.lists, self._keep(current, hand_over)) for current in currents}

    def _keep(self, current: Current, hand_over: bool) -> list[Tensor]:
        params, grads = current.lists.params, current.grads
        ours = [False] * len(grads)
        if hand_over:
            for param in params:
                param.grad = None
            ours = nobody_else_has(grads)
        kept, copied = [], []
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if ours[i]:
                kept.append(grad)
                continue
            param.grad = grad
            copy = self._copies.get(param)
            if copy is None or copy.dtype != grad.dtype or copy.device != grad.device or copy.stride() != grad.stride():
                copy = self._copies[param] = torch.empty_like(grad, requires_grad=False)
            kept.append(copy)
            copied.append(i)
        if copied:
            functional.restore_([kept[i] for i in copied], [grads[i] for i in copied])
        return current.lists.grads(kept)

    def of(self, current: Current) -> list[Tensor]:
        """One for each parameter of ``current``: zeros for one that had no gradient in the first pass."""
        known = self._kept.get(current.index)
        if known is not None and known[0] is current.lists:
            return known[1]
        kept = {} if known is None else dict(zip(known[0].params, known[1], strict=True))
        zeros = (torch.zeros_like(grad) for grad in current.grads)
        return current.lists.grads([kept.get(param, zero) for param, zero in zip(current.lists.params, zeros, strict=True)])

    def forget(self) -> None:
        """The step is over. Copies are kept for the next."""
        self._kept = {}

    def release(self) -> None:
        """Frees the copies."""
        self._kept, self._copies = {}, {}
