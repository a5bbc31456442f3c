"""m-SAM's descent gradient: the mean of the gradients that the micro-batches gave at their own perturbed points (arXiv 2509.18001)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sam_kernels import functional
from sam_kernels.optim._engine.lists import GroupGrads, GroupLists, Key
from sam_kernels.optim._engine.ownership import take_over
from sam_kernels.optim._engine.passes import Passes
from sam_kernels.optim._types import ParamGroup

__all__ = ["GradientMean", "mean_loss"]

_HALVES = (torch.bfloat16, torch.float16)


@dataclass
class _Part:
    """Parameters of one group that have had equally many gradients, and the means of those."""

    lists: GroupLists
    means: list[Tensor]
    count: int


class GradientMean:
    """Mean over ``count`` micro-batches, one tensor a parameter; a parameter without a gradient in one of them counts as zero there.

    The first gradient is taken over as it is where nobody else has it (no bytes), else copied (2 N s): float32 for a 16-bit parameter,
    whose mean is rounded once, at the end. Each one after that is one pass, mean <- mean + (g - mean) / j: 3 N s. That pass is the one of
    :func:`sam_kernels.functional.direction_norm_`, whose norm of the mean comes for nothing and tells a gradient that is not finite, so
    the descent need not read the mean to know. A gradient that was copied is never written.
    """

    def __init__(self, count: int, passes: Passes) -> None:
        self._count = count
        self._passes = passes
        self._parts: dict[Key, list[_Part]] = {}
        self._norms: list[tuple[GroupLists, Tensor]] = []

    def add(self, groups: list[ParamGroup]) -> None:
        """Adds the gradients as they are. One that is taken over is no longer its parameter's ``grad``, where it could be zeroed."""
        self._passes.skips.forget_last_step()
        self._norms = []
        for current in self._passes.lists.group_grads(groups):
            parts = self._parts.get(current.key, [])
            if len(parts) == 1 and parts[0].lists is current.lists:
                self._average(parts[0], current.grads)
            elif parts:
                self._parts[current.key] = self._add_unevenly(parts, current)
            else:
                self._parts[current.key] = [self._first(current.lists, current.grads)]

    def put(self, groups: list[ParamGroup]) -> Tensor | None:
        """Makes the mean the parameters' gradient. Returns its norm, () on the first part's device, where that is known."""
        norm_is_known = True
        for group in groups:
            for param in group["params"]:
                param.grad = None
        for parts in self._parts.values():
            for part in parts:
                if part.count < self._count:
                    torch._foreach_mul_(list(part.means), part.count / self._count)
                    norm_is_known = False
                params = part.lists.params
                part.lists.put_grads(
                    [mean if mean.dtype is param.dtype else mean.to(param.dtype) for param, mean in zip(params, part.means, strict=True)]
                )
        known = norm_is_known and len(self._norms) == sum(map(len, self._parts.values())) > 0
        if self._passes.lists.shards and not known:  # other ranks may know theirs, and all put them together
            parts, found_inf = [part for parts in self._parts.values() for part in parts], self._passes.found_inf
            self._norms, known = [(part.lists, functional.grad_norm(part.means, found_inf=found_inf)) for part in parts], True
        return self._passes.combined(self._norms) if known else None

    def _first(self, lists: GroupLists, grads: list[Tensor]) -> _Part:
        ours = take_over(lists.owners, grads)
        means, copied = [], []
        for i, (param, grad) in enumerate(zip(lists.params, grads, strict=True)):
            fits = grad.stride() == param.stride() and grad.dtype not in _HALVES and not grad.requires_grad
            if ours[i] and fits:
                means.append(grad)
                continue
            means.append(torch.empty_like(param, dtype=torch.float32 if grad.dtype in _HALVES else grad.dtype, requires_grad=False))
            copied.append(i)
        if len(copied) == len(means):
            functional.restore_(lists.grads(means), grads)
        elif copied:
            functional.restore_([means[i] for i in copied], [grads[i] for i in copied])
        return _Part(lists, lists.grads(means), 1)

    def _average(self, part: _Part, grads: list[Tensor]) -> None:
        part.count += 1
        means, found_inf = cast("list[Tensor | None]", part.means), self._passes.found_inf
        # m <- (1 - theta) m + theta g
        norm = functional.direction_norm_(grads, means, kind="vasso", theta=1.0 / part.count, found_inf=found_inf)
        self._norms.append((part.lists, norm))

    def _add_unevenly(self, parts: list[_Part], current: GroupGrads) -> list[_Part]:
        """Other parameters than last time have a gradient: parts by the number of gradients so far."""
        known = {param: (mean, part.count) for part in parts for param, mean in zip(part.lists.owners, part.means, strict=True)}
        rows: dict[
            tuple[int, bool], list[tuple[Tensor, Tensor | None, Tensor | None]]
        ] = {}  # count, has one now -> parameter, mean, gradient
        for param, grad in zip(current.lists.owners, current.grads, strict=True):
            mean, count = known.pop(param, (None, 0))
            rows.setdefault((count, True), []).append((param, mean, grad))
        for param, (mean, count) in known.items():
            rows.setdefault((count, False), []).append((param, mean, None))
        found = []
        for (count, has_gradient), members in rows.items():
            lists = self._passes.lists.made([param for param, _, _ in members])
            grads = lists.grads([grad for _, _, grad in members if grad is not None])
            if count == 0:
                found.append(self._first(lists, grads))
                continue
            part = _Part(lists, lists.grads([mean for _, mean, _ in members if mean is not None]), count)
            if has_gradient:
                self._average(part, grads)
            found.append(part)
        return found


def mean_loss(losses: Sequence[Any]) -> Any:
    """Mean of what the closures returned: a tensor where all are tensors, None where one returned None."""
    if any(loss is None for loss in losses):
        return None
    if all(isinstance(loss, Tensor) for loss in losses):
        return torch.stack([loss.detach() for loss in losses]).mean()
    return sum(losses) / len(losses)
