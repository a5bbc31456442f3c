"""SAM's gradient in the place of an ordinary one: what ``opt.backward(closure)`` does with ``.grad``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from sam_kernels._sharding import is_dtensor
from sam_kernels.optim._shards.dtensor import local_grad, local_of
from sam_kernels.optim._types import ParamGroup

__all__ = ["OuterGrads", "add_not_finite", "still_not_finite"]


_COMPUTES_NOTHING = "SAM.backward: the closure left no gradient; it must run the forward pass and call backward() on the loss"


class OuterGrads:
    """The gradients that were there before the call, put aside while both passes run.

    Adding SAM's gradient to them is one pass, 3 N s; nothing where there were none. With several processes the second pass is given a copy
    of them to accumulate into (2 N s more): DistributedDataParallel reduces all that has been accumulated, and may keep it in memory that
    the first pass writes.
    """

    def __init__(self, groups: Sequence[ParamGroup], *, may_lack_gradients: bool = False) -> None:
        """``may_lack_gradients``: no gradient at all is no error here, since other ranks may have some."""
        self._may_lack_gradients = may_lack_gradients
        self.lacks_gradient: str | None = None  # words of the error, where no rank has a gradient
        self._params = [param for group in groups for param in group["params"]]  # a frozen one may still have a gradient
        self._outer = [param.grad for param in self._params]
        has_processes = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._is_shared = has_processes and not any(map(is_dtensor, self._params))  # FSDP2 reduces the new gradient alone
        self._copies = [grad if grad is None or not self._is_shared else grad.clone() for grad in self._outer]
        self._hook: Any = None
        self._was_zeroed = False
        self.clear()

    @property
    def are_there(self) -> bool:
        """Whether a parameter had a gradient."""
        return any(grad is not None for grad in self._outer)

    @property
    def are_shared(self) -> bool:
        """Whether the second pass accumulates into them."""
        return self._is_shared and self.are_there

    def called(self, closure: Callable[[], Any]) -> Any:
        """What the closure returns. Raises RuntimeError where it computes no gradient, or zeroes those it is to add to."""
        result = closure()
        is_lacking = self._params and all(param.grad is None for param in self._params)
        self.lacks_gradient = _COMPUTES_NOTHING if is_lacking else None
        if is_lacking and not self._may_lack_gradients:
            raise RuntimeError(_COMPUTES_NOTHING)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._was_zeroed:
            raise RuntimeError(
                "SAM.backward: the closure zeroed gradients that were accumulated before the call; leave zero_grad() to the training loop"
            )
        return result

    def clear(self) -> None:
        """No gradient, as if nothing had been accumulated."""
        for param in self._params:
            param.grad = None

    def before_second_pass(self) -> None:
        """Where gradients are reduced, what is accumulated so far must be reduced with them."""
        for param, copy in zip(self._params, self._copies, strict=True):
            param.grad = copy if self._is_shared else None
        rows = zip(self._params, self._outer, self._copies, strict=True)
        watched = next((each for each in rows if each[0].requires_grad and each[2] is not None), None)
        if self._is_shared and watched is not None:
            self._watch(*watched)

    def _watch(self, param: Tensor, outer: Tensor | None, copy: Tensor | None) -> None:
        assert outer is not None
        assert copy is not None
        version = copy._version

        def about_to_accumulate(_: Tensor) -> None:
            was_zeroed = param.grad is copy and copy._version != version and not copy.any() and bool(outer.any())
            self._was_zeroed = self._was_zeroed or param.grad is None or was_zeroed

        self._hook = param.register_hook(about_to_accumulate)  # type: ignore[no-untyped-call]  # torch's

    @torch.no_grad()
    def add(self) -> None:
        """``.grad`` becomes what it was before the call plus what it is now."""
        if self._is_shared:
            return
        both = []
        for param, outer in zip(self._params, self._outer, strict=True):
            if outer is None:
                continue
            if param.grad is not None:
                both.append((local_grad(param, outer), local_grad(param, param.grad)))
            param.grad = outer
        dense = [(outer, grad) for outer, grad in both if grad.dtype is outer.dtype and not grad.is_sparse]
        if dense:
            torch._foreach_add_([outer for outer, _ in dense], [grad for _, grad in dense])
        for outer, grad in both:
            if grad.dtype is not outer.dtype or grad.is_sparse:
                outer.add_(grad)

    def put_back(self) -> None:
        """After an exception: ``.grad`` is as before the call."""
        if self._hook is not None:
            self._hook.remove()
        for param, outer in zip(self._params, self._outer, strict=True):
            param.grad = outer


def _marker(groups: Sequence[ParamGroup]) -> Tensor | None:  # (1,)
    """The first element of the gradients."""
    for group in groups:
        for param in group["params"]:
            grad = None if param.grad is None else local_of(param.grad)  # as it lies: to redistribute it, all ranks would have to
            if grad is not None and hasattr(grad, "wait"):  # a collective that is still under way
                grad = grad.wait()
            if grad is not None and grad.numel():
                return grad.as_strided((1,), (1,), grad.storage_offset())
    return None


@torch.no_grad()
def add_not_finite(groups: Sequence[ParamGroup], found_inf: Tensor) -> None:  # ()
    """Makes one element of the gradients NaN where ``found_inf`` is set, so that whoever looks at them skips the step. Nobody waits."""
    marker = _marker(groups)
    if marker is not None:
        marker.masked_fill_((found_inf != 0).to(marker.device), torch.nan)


@torch.no_grad()
def still_not_finite(groups: Sequence[ParamGroup], found_inf: Tensor) -> Tensor:  # () -> ()
    """``found_inf``, 0 where the gradients that :func:`add_not_finite` has marked were zeroed since."""
    marker = _marker(groups)
    return torch.zeros_like(found_inf) if marker is None else found_inf * ~marker.isfinite().to(found_inf.device).squeeze(0)
