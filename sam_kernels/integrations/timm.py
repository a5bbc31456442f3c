"""timm's training loop with SAM: a loss scaler that takes the forward pass in the place of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import Tensor

from sam_kernels._validate import describe
from sam_kernels.integrations._found import find_sam
from sam_kernels.optim.rwsam import RWSAM
from sam_kernels.optim.sam import SAM

__all__ = ["SAMScaler"]


class SAMScaler(NativeScaler):  # type: ignore[misc]  # Any where timm is not installed
    """``timm.utils.NativeScaler`` for an optimizer of SAM: it is called with the forward pass, which it runs at the weights and at the
    perturbed point, with a backward pass after each (:meth:`sam_kernels.SAM.backward`)::

        loss_scaler = SAMScaler(device.type)                     # was: NativeScaler(device=device.type)
        loss = loss_scaler(_forward, optimizer, ...)             # was: loss = _forward(); loss_scaler(loss, optimizer, ...)

    Clipping is of the second gradient alone, in timm's modes. Calls with ``need_update=False`` accumulate; each has a perturbation of its
    own (m-SAM). ``state_dict`` is that of ``NativeScaler``.

    Args:
        device: type of the device of the loss, as for ``NativeScaler``.
        enabled: False scales nothing, for float32 and bfloat16: the same loop without ``--amp``.
    """

    def __init__(self, device: str = "cuda", *, enabled: bool = True) -> None:
        if enabled:
            super().__init__(device)
        else:
            self._scaler = torch.amp.GradScaler(device, enabled=False)

    def __call__(
        self,
        forward: Callable[[], Tensor],
        optimizer: Any,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        parameters: Iterable[Tensor] | None = None,
        create_graph: bool = False,
        need_update: bool = True,
    ) -> Tensor:  # ()
        """Two passes, and with ``need_update`` clipping and the step. Returns the loss at the weights, unscaled.

        Args:
            forward: runs the model and returns the loss, shape (); called twice. Mixup and other random augmentation belong before it.
            optimizer: SAM.
            clip_grad, clip_mode, parameters: as for ``NativeScaler``.
            create_graph: must be False: the gradient that is left is not a function of the weights that autograd knows.
            need_update: False for the micro-batches of a step before its last.

        Raises:
            TypeError: for a loss in the place of the forward pass, for an optimizer that is not SAM's, for RWSAM, whose closure returns
                losses of samples.
            ValueError: for ``create_graph``, for ``clip_grad`` without ``parameters``.
        """
        if not callable(forward):
            raise TypeError(
                f"SAMScaler: expected the forward pass, a function that returns the loss, got {describe(forward)}; write "
                "loss = loss_scaler(_forward, optimizer, ...) in the place of loss = _forward() and loss_scaler(loss, optimizer, ...)"
            )
        sam = _checked(optimizer)
        if create_graph:
            raise ValueError("SAMScaler: create_graph=True (Adahessian) needs the graph of a gradient, which SAM's is not; leave it out")
        if clip_grad is not None and parameters is None:
            raise ValueError("SAMScaler: clip_grad needs parameters, as for timm's NativeScaler: parameters=model_parameters(model)")
        scaler = self._scaler

        def closure() -> Tensor:
            loss = forward()
            scaled: Tensor = scaler.scale(loss)
            scaled.backward()  # type: ignore[no-untyped-call]  # torch's
            return loss

        loss = sam.backward(closure, grad_scaler=scaler)
        if need_update:
            if clip_grad is not None:
                scaler.unscale_(optimizer)
                dispatch_clip_grad(parameters, clip_grad, mode=clip_mode)
            scaler.step(optimizer)
            scaler.update()
        return loss


def _checked(optimizer: Any) -> SAM:
    found = find_sam(optimizer)
    if found is None:
        raise TypeError(
            f"SAMScaler: the optimizer is {describe(optimizer)}; put SAM around it, SAM(optimizer.param_groups, optimizer, rho=0.05), or "
            "use timm's NativeScaler"
        )
    if isinstance(found, RWSAM):
        raise TypeError("SAMScaler: RWSAM needs losses of samples; write optimizer.backward(closure), whose closure returns them")
    return found
