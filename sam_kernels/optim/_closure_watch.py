"""Closures that do not do their part: gradients that they add to older ones, or do not compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

__all__ = ["ClosureWatch"]

_ADDS = (
    "SAM.step: the closure added its gradient to one that was in .grad before, so the two belong to different points; zero the gradients "
    "at the beginning of the closure. For gradient accumulation call optimizer.backward(closure) once for each batch and then "
    "optimizer.step(), or give step(closure, batch=..., micro_batches=k)"
)
_COMPUTES_NOTHING = (
    "SAM.step: the closure left no gradient of its own; it must zero the gradients, run the forward pass and call backward() on the loss, "
    "and is called twice. (A loop of loss.backward() and optimizer.step() needs optimizer.backward(closure) in the place of the first.)"
)


class ClosureWatch:
    """Watches one call of a closure by the gradients of two parameters, the first and the last that have one.

    Whether a gradient is added to an older one is seen where autograd is about to do it: a hook of the parameter finds the old gradient
    still in place, unwritten. One that was zeroed in place, or set anew by hand, is none.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self._groups = groups
        self._adds = False
        self._ran = False
        first = next(_with_old_grads(groups), None)
        last = None if first is None else next(_with_old_grads(groups, last_first=True))
        watched = [] if first is None else [first] if last is first else [first, last]
        self._old = [(param, param.grad, param.grad.detach()) for param in watched if param is not None and param.grad is not None]

    def __enter__(self) -> ClosureWatch:
        # An alias stands in for each gradient: assigning the old tensor again is seen, too.
        self._hooks = []
        for param, _, alias in self._old:
            param.grad = alias
            self._hooks.append(param.register_hook(self._hook(param, alias, alias._version)))  # type: ignore[no-untyped-call]  # torch's
        self._versions = [alias._version for _, _, alias in self._old]
        return self

    def _hook(self, param: Tensor, alias: Tensor, version: int) -> Callable[[Tensor], None]:
        def about_to_accumulate(_: Tensor) -> None:
            self._ran = True
            if not self._adds and param.grad is alias and alias._version == version:
                self._adds = bool(alias.any())  # zeroed through .data, where no version counts

        return about_to_accumulate

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        untouched = bool(self._old) and not self._ran
        for (param, grad, alias), version in zip(self._old, self._versions, strict=True):
            if param.grad is alias:
                untouched = untouched and alias._version == version and alias.is_cpu  # a replayed graph writes unseen
                param.grad = grad
            else:
                untouched = False
        self._old = []
        if kind is not None:
            return
        if self._adds:
            raise RuntimeError(_ADDS)
        if untouched or not _has_grads(self._groups):
            raise RuntimeError(_COMPUTES_NOTHING)


def _with_old_grads(groups: Sequence[dict[str, Any]], *, last_first: bool = False) -> Iterator[Tensor]:
    for group in reversed(groups) if last_first else groups:
        params = group["params"]
        yield from (param for param in (reversed(params) if last_first else params) if param.requires_grad and param.grad is not None)


def _has_grads(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether there is a gradient, or nothing that could have one."""
    trainable = False
    for group in groups:
        for param in group["params"]:
            if param.grad is not None:
                return True
            trainable = trainable or param.requires_grad
    return not trainable
