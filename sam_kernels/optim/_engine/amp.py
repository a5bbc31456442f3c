"""Loss scaling: what is read from an unmodified ``torch.amp.GradScaler``, and what it is told."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

__all__ = [
    "check_order",
    "check_scaler",
    "check_unscaled",
    "forget_scaler",
    "has_just_checked",
    "hide_grad_scaler",
    "report_step",
    "scale_of",
]


def check_scaler(grad_scaler: Any) -> GradScaler | None:
    """The scaler, None where there is none or it is disabled. Raises TypeError for anything else."""
    if grad_scaler is None:
        return None
    if not isinstance(grad_scaler, GradScaler):
        raise TypeError(f"SAM: grad_scaler must be a torch.amp.GradScaler, got {type(grad_scaler).__name__}")
    return grad_scaler if grad_scaler.is_enabled() else None


def scale_of(grad_scaler: GradScaler | None, share: float = 1.0, device: torch.device | None = None) -> Tensor | None:
    """() float32, on the device: what gradients are multiplied by. ``share``: what the caller has multiplied the loss by beside.

    Raises RuntimeError when the scaler has not scaled a loss yet.
    """
    if grad_scaler is None:
        return None if share == 1.0 else torch.full((), share, dtype=torch.float64, device=device)
    scale = grad_scaler._get_scale_async()
    if scale is None:
        raise RuntimeError("SAM: grad_scaler was given, but the closure has not called grad_scaler.scale(loss).backward()")
    return scale if share == 1.0 else scale * share


def check_unscaled(grad_scaler: GradScaler | None, optimizer: Optimizer) -> None:
    """Raises RuntimeError where ``first_step`` is given a scaler whose scale is not in the gradients any more."""
    if grad_scaler is not None and grad_scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.UNSCALED:
        raise RuntimeError(
            "SAM.first_step: grad_scaler.unscale_(optimizer) has been called already, so the gradients are not scaled; call first_step() "
            "without grad_scaler, then grad_scaler.unscale_(optimizer.base_optimizer) and second_step() after the second backward pass"
        )


def check_order(scale_is_known: bool, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Raises RuntimeError where ``scaler.step(optimizer)`` takes the gradients of the second pass for unscaled, and the first pass may have
    been the one that was unscaled. ``scale_is_known``: first_step was given the scaler, so that one was not."""
    if found_inf is not None and grad_scale is None and not scale_is_known:
        raise RuntimeError(
            "SAM: grad_scaler.unscale_(optimizer) was called before grad_scaler.step(optimizer), and whether for the first or the second "
            "pass is not known; give grad_scaler to first_step, or call grad_scaler.unscale_(optimizer.base_optimizer) and second_step() "
            "in the place of grad_scaler.step(optimizer)"
        )


def has_just_checked(optimizer: Optimizer) -> bool:
    """Whether ``GradScaler.step`` has called this step, having looked at every gradient of ``optimizer`` on the way: its ``found_inf`` is
    then the answer to ``check_finite`` too.

    Without a scale beside it ``unscale_`` has looked, earlier: clipping or anything else may have written the gradients since. Hooks run
    between the look and the step, and may write them as well.
    """
    if not all(isinstance(optimizer.__dict__.get(name), Tensor) for name in ("grad_scale", "found_inf")):
        return False
    return not (optimizer._optimizer_step_pre_hooks or torch_optimizer._global_optimizer_pre_hooks)


def forget_scaler(optimizer: Optimizer) -> None:
    """After an exception in ``step``: delete the attributes that ``GradScaler.step`` sets on the optimizer, and would have deleted."""
    for name in ("grad_scale", "found_inf"):
        optimizer.__dict__.pop(name, None)


def report_step(grad_scaler: GradScaler | None, optimizer: Optimizer, found_inf: Tensor) -> None:
    """Tells the scaler what its own ``step`` would have found out, so that ``grad_scaler.update()`` halves the scale where it must."""
    if grad_scaler is None:
        return
    state = grad_scaler._per_optimizer_states[id(optimizer)]
    state["found_inf_per_device"] = {found_inf.device: found_inf.clone()}
    state["stage"] = OptState.STEPPED


def hide_grad_scaler(step: Any) -> None:
    """GradScaler.step passes itself, with a deprecation warning, to a step whose signature names ``grad_scaler``: hide it."""
    signature = inspect.signature(step)
    kept = [parameter for name, parameter in signature.parameters.items() if name != "grad_scaler"]
    step.__signature__ = signature.replace(parameters=kept)
