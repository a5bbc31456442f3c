"""Closures that do not do their part: gradients that they add to older ones, or do not compute."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sam_kernels._memory_of import is_fake
from sam_kernels._sharding import is_dtensor
from sam_kernels.optim._engine.warn import warn_user
from sam_kernels.optim._shards.dtensor import local_of
from sam_kernels.optim._types import ParamGroup

__all__ = ["ClosureWatch", "HalvesWatch"]

_ADDS = (
    "SAM.step: the closure added its gradient to one that was in .grad before, so the two belong to different points; zero the gradients "
    "at the beginning of the closure. For gradient accumulation call optimizer.backward(closure) once for each batch and then "
    "optimizer.step(), or give step(closure, batch=..., micro_batches=k)"
)
_COMPUTES_NOTHING = (
    "SAM.step: the closure left no gradient of its own; it must zero the gradients, run the forward pass and call backward() on the loss, "
    "and is called twice. (A loop of loss.backward() and optimizer.step() needs optimizer.backward(closure) in the place of the first.)"
)
_ADDS_HALVES = (
    "SAM: the second backward pass added its gradient to that of the first pass, so the update is along a sum of gradients of two points; "
    "call first_step(zero_grad=True), or zero_grad() between the passes"
)
_STEPS_WATCHED = 2
_LOOKED_AT = 64  # elements of an old gradient


class ClosureWatch:
    """Watches one call of a closure by the gradients of two parameters, the first and the last that have one.

    Whether a gradient is added to an older one is seen where autograd does it: one hook of the parameter finds the old gradient still in
    place, unwritten, and the next one hears that autograd has accumulated. One that was zeroed in place, or set by hand, is none.
    """

    def __init__(self, groups: Sequence[ParamGroup], *, may_lack_gradients: bool = False) -> None:
        """``may_lack_gradients``: no gradient at all is no error here, since other ranks may have some."""
        self._groups = groups
        self._may_lack_gradients = may_lack_gradients
        self.lacks_gradient: str | None = None  # words of the error, where no rank has a gradient

    def __enter__(self) -> ClosureWatch:
        self._grads = [_OldGrad(param, grad, grad.detach()) for param, grad in _first_and_last(self._groups)]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        are_touched = [grad.end() for grad in self._grads]
        adds = any(grad.was_added_to for grad in self._grads)
        self._grads = []
        if kind is not None:
            return
        if adds:
            raise RuntimeError(_ADDS)
        has_grads = _has_grads(self._groups)
        if (are_touched and not any(are_touched)) or not (has_grads or self._may_lack_gradients):
            raise RuntimeError(_COMPUTES_NOTHING)
        self.lacks_gradient = None if has_grads else _COMPUTES_NOTHING


class HalvesWatch:
    """Watches the two-step API between :meth:`first_step` and :meth:`second_step`, in the first steps of an optimizer alone: a loop that
    leaves ``zero_grad`` out does so from the beginning. Some may want the sum, so it is no error."""

    def __init__(self) -> None:
        self._grads: list[_OldGrad] = []
        self._steps = 0

    def begin(self, groups: Sequence[ParamGroup]) -> None:
        """After the ascent, where the gradients have not been zeroed."""
        self.end()
        self._steps += 1
        if self._steps <= _STEPS_WATCHED:
            self._grads = [_OldGrad(param, grad, grad) for param, grad in _first_and_last(groups)]

    def end(self) -> bool:
        """Whether a gradient of the second pass was added to one of the first."""
        for grad in self._grads:
            grad.end()
        adds = any(grad.was_added_to for grad in self._grads)
        self._grads = []
        return adds

    def check(self) -> None:
        """Before the update. Warns where gradients of two points were added up."""
        if self.end():
            self._steps = _STEPS_WATCHED
            warn_user(_ADDS_HALVES)


class _OldGrad:
    """A gradient that was there before, watched until :meth:`end`. Meanwhile ``stand_in`` takes its place: if that is an alias, a closure
    that assigns the old tensor again is seen too.

    FSDP2 accumulates by itself: it adds to the local part of a DTensor and then calls the hooks that follow an accumulation alone.
    """

    def __init__(self, param: Tensor, grad: Tensor, stand_in: Tensor) -> None:
        self._param, self._grad, self._alias = param, grad, stand_in
        self.was_added_to = False
        self._is_about_to_be = False
        self._was_reached = False  # by autograd
        param.grad = stand_in
        # Values show writes that no version counts. They are not needed where the gradient stands in for itself.
        self._versions, self._values = self._read_versions(), None if self._alias is self._grad else _some_of(self._alias)
        self._had_values = is_dtensor(self._alias) and bool(local_of(self._alias).any())
        before = self._param.register_hook(self._before)  # type: ignore[no-untyped-call]  # torch's
        after = self._param.register_post_accumulate_grad_hook(self._after)  # type: ignore[no-untyped-call]  # torch's
        self._hooks = [before, after]

    def _is_unwritten(self) -> bool:
        return self._param.grad is self._alias and self._read_versions() == self._versions

    def _read_versions(self) -> tuple[int, int]:
        """Of the gradient and, of a DTensor, of its local part."""
        return self._alias._version, local_of(self._alias)._version

    def _before(self, _: Tensor) -> None:
        """Autograd has the gradient. It may be going to be returned by ``torch.autograd.grad``."""
        self._was_reached = True
        # Zeroed through .data, no version counts.
        self._is_about_to_be = self._is_unwritten() and not is_fake(self._alias) and bool(local_of(self._alias).any())

    def _after(self, _: Tensor) -> None:
        if is_dtensor(self._alias) and not self._was_reached:
            (version, local_version), was_added = self._versions, self._param.grad is self._alias and self._had_values
            self._was_reached = True
            self._is_about_to_be = was_added and self._read_versions() == (version, local_version + 1)
        self.was_added_to = self.was_added_to or self._is_about_to_be

    def end(self) -> bool:
        """The old gradient, where it still is one, is the parameter's again. Returns whether anything has been done to it."""
        for hook in self._hooks:
            hook.remove()
        is_same = self._is_unwritten() and not self._was_reached
        # Written unseen: on a device by a replayed graph, on the CPU through .data.
        is_same = is_same and self._values is not None and torch.equal(self._values, _some_of(self._alias))  # type: ignore[arg-type]
        if self._param.grad is self._alias:
            self._param.grad = self._grad
        return not is_same


def _some_of(grad: Tensor) -> Tensor | None:
    """A copy of some elements; None where looking at them would wait, or cannot be done."""
    grad = local_of(grad)
    if not grad.is_cpu or grad.layout is not torch.strided or is_fake(grad):
        return None
    return grad[tuple(slice(_LOOKED_AT if i == grad.dim() - 1 else 1) for i in range(grad.dim()))].clone()


def _first_and_last(groups: Sequence[ParamGroup]) -> list[tuple[Tensor, Tensor]]:
    """The first and the last parameter that have a gradient, with it."""
    first = _first(group["params"] for group in groups)
    if first is None:
        return []
    last = _first(reversed(group["params"]) for group in reversed(groups))
    return [first] if last is None or last[0] is first[0] else [first, last]


def _first(lists: Iterable[Iterable[Tensor]]) -> tuple[Tensor, Tensor] | None:
    for params in lists:
        for param in params:
            if param.requires_grad and (grad := param.grad) is not None:
                return param, grad
    return None


def _has_grads(groups: Sequence[ParamGroup]) -> bool:
    """Whether a parameter has a gradient, or none requires one."""
    for group in groups:
        for param in group["params"]:
            if param.grad is not None:
                return True
    return not any(param.requires_grad for group in groups for param in group["params"])
