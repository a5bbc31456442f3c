"""The descent: restore and update in one pass."""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import Tensor

from sam_kernels import _validate
from sam_kernels._grouping import run, split
from sam_kernels._tensor_list import TensorList
from sam_kernels.functional._common import (
    Tensors,
    TensorsOrNone,
    check_amp,
    check_clip,
    check_lists,
    check_with_gaps,
    first_and_later,
    pick,
)
from sam_kernels.functional._flat import MOMENTUM
from sam_kernels.functional._library import operation
from sam_kernels.operations import AdamWStep, Number, SgdStep

__all__ = ["adamw_step_", "sgd_step_"]


@operation(written=SgdStep.written, flat=MOMENTUM)
def sgd_step_(
    params: Tensors,  # n tensors
    grads: Tensors,  # n tensors
    momentum_buffers: TensorsOrNone | None,  # n tensors
    *,
    old_params: Tensors | None = None,  # n tensors
    lr: Number,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
    norm: Tensor | None = None,  # () norm of the gradients as given
    max_norm: float | None = None,
) -> None:
    """Restore and ``torch.optim.SGD`` in one pass: the step is made from ``old_params`` (where given) and written to ``params``.

    ``momentum_buffers`` is ignored where ``momentum`` is 0. An entry that is None is a first step: the buffer becomes the update itself,
    without dampening, and is put into the list (as zeros if the step is skipped where that cannot be known without waiting for a device,
    and under ``torch.compile``).
    ``grad_scale`` divides the gradients; ``max_norm`` (needs ``norm``) multiplies them by
    min(1, max_norm / (norm / grad_scale + 1e-6)). Where ``found_inf`` is set or ``norm`` is not finite, parameters are restored and nothing
    else happens. Reads old_p (else p), g, m; writes p, m: 5 N s bytes.
    """
    name = SgdStep.name
    lr = _validate.check_number_or_tensor(name, "lr", lr, low=0.0)
    momentum = _validate.check_number(name, "momentum", momentum, low=0.0)
    dampening = _validate.check_number(name, "dampening", dampening)
    weight_decay = _validate.check_number(name, "weight_decay", weight_decay, low=0.0)
    _validate.check_flag(name, "nesterov", nesterov)
    _validate.check_flag(name, "maximize", maximize)
    if nesterov and (momentum == 0.0 or dampening != 0.0):
        raise ValueError(f"{name}: nesterov=True needs momentum > 0 and dampening = 0, got momentum={momentum}, dampening={dampening}")
    max_norm = check_clip(name, norm, max_norm)
    check_amp(name, grad_scale, found_inf)
    buffers: TensorsOrNone | None = momentum_buffers if momentum != 0.0 else None
    if buffers is None and momentum != 0.0:
        raise TypeError(f"{name}: momentum_buffers must be a list of tensors or None, got {_validate.describe(momentum_buffers)}")
    # Whole lists before they are cut into parts: messages carry the caller's indices.
    lists: dict[str, Tensors | None] = {"params": params, "grads": grads, "old_params": old_params}
    if buffers is not None:
        check_with_gaps(name, lists, "momentum_buffers", buffers, written=SgdStep.written)
    else:
        check_lists(SgdStep, lists)
    op = SgdStep(
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
        norm=norm,
        max_norm=max_norm,
    )
    if buffers is None or isinstance(buffers, TensorList):
        run(op, {**lists, "momentum_buffers": buffers})
    else:
        _sgd_with_gaps(op, lists, buffers)


def _sgd_with_gaps(op: SgdStep, lists: dict[str, Tensors | None], buffers: list[Tensor | None]) -> None:
    """Rows whose buffer is None make their first step."""
    prepared = []
    for is_first, indices in first_and_later(buffers):
        part = {role: pick(tensors, indices) for role, tensors in lists.items()}
        # Zeros, for a device on which a skipped first step is not known of without waiting: the buffer then stays, and must hold something.
        fresh = [torch.zeros_like(param) for param in part["params"] or ()] if is_first else None
        part["momentum_buffers"] = fresh if fresh is not None else pick(cast(Tensors, buffers), indices)
        prepared.append((dataclasses.replace(op, first_step=is_first), indices, fresh, split(part, written=op.written)))
    for mine, indices, fresh, parts in prepared:  # after all lists are known to have a backend
        stepped = True
        for rows in parts:
            stepped = rows.run(mine)
        if fresh is not None and stepped:
            for i, buffer in zip(range(len(fresh)) if indices is None else indices, fresh, strict=True):
                buffers[i] = buffer


@operation(written=(*AdamWStep.written, "state_steps"))
def adamw_step_(
    params: Tensors,  # n tensors
    grads: Tensors,  # n tensors
    exp_avgs: Tensors,  # n tensors
    exp_avg_sqs: Tensors,  # n tensors
    state_steps: Tensors,  # n () float32 or float64: steps made so far
    *,
    old_params: Tensors | None = None,  # n tensors
    lr: Number,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    maximize: bool = False,
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
    norm: Tensor | None = None,  # () norm of the gradients as given
    max_norm: float | None = None,
) -> None:
    """Restore and ``torch.optim.AdamW`` (``decoupled``) or ``Adam`` in one pass, from ``old_params`` (where given) to ``params``.

    Adds one to every ``state_steps``. ``grad_scale``, ``found_inf``, ``norm`` and ``max_norm`` as in :func:`sgd_step_`.
    Reads old_p (else p), g, m, v; writes p, m, v: 7 N s bytes.
    """
    name = AdamWStep.name
    lr = _validate.check_number_or_tensor(name, "lr", lr, low=0.0)
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"{name}: betas must be a pair of numbers, got {_validate.describe(betas)}")
    beta1 = _validate.check_number(name, "betas[0]", betas[0], low=0.0, high=1.0, open_high=True)
    beta2 = _validate.check_number(name, "betas[1]", betas[1], low=0.0, high=1.0, open_high=True)
    eps = _validate.check_number(name, "eps", eps, low=0.0)
    weight_decay = _validate.check_number(name, "weight_decay", weight_decay, low=0.0)
    _validate.check_flag(name, "decoupled", decoupled)
    _validate.check_flag(name, "maximize", maximize)
    max_norm = check_clip(name, norm, max_norm)
    check_amp(name, grad_scale, found_inf)
    lists = {"params": params, "grads": grads, "old_params": old_params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    check_lists(AdamWStep, lists)
    _check_steps(name, state_steps, len(params))
    op = AdamWStep(
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
        norm=norm,
        max_norm=max_norm,
    )
    for rows in split(lists, written=op.written):
        indices = rows.lists.indices
        rows.lists["state_steps"] = cast("list[Tensor]", state_steps if len(indices) == len(params) else pick(state_steps, list(indices)))
        rows.run(op)


def _check_steps(name: str, state_steps: Tensors, count: int) -> None:
    if not isinstance(state_steps, TensorList):
        if not isinstance(state_steps, list | tuple):
            raise TypeError(f"{name}: state_steps must be a list or tuple of tensors, got {_validate.describe(state_steps)}")
        for i, step in enumerate(state_steps):
            _validate.check_counter(name, f"state_steps[{i}]", step)
        _validate.check_distinct(name, {"state_steps": state_steps})
    if len(state_steps) != count:
        raise ValueError(f"{name}: state_steps has {len(state_steps)} tensors, params has {count}")
