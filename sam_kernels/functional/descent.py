"""The descent: restore and update in one pass."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from sam_kernels import _validate
from sam_kernels._grouping import split
from sam_kernels._tensor_list import TensorList, are_trusted
from sam_kernels.functional._common import (
    Number,
    Tensors,
    TensorsOrNone,
    check_amp,
    check_clip,
    check_with_gaps,
    checked,
    device_of,
    first_and_later,
    number_on,
    on,
    pick,
)
from sam_kernels.functional._flat import MOMENTUM
from sam_kernels.functional._library import operation

__all__ = ["adamw_step_", "sgd_step_"]


@operation(written=("params", "momentum_buffers"), flat=MOMENTUM)
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
    op = "sgd_step_"
    lr = _validate.check_number_or_tensor(op, "lr", lr, low=0.0)
    momentum = _validate.check_number(op, "momentum", momentum, low=0.0)
    dampening = _validate.check_number(op, "dampening", dampening)
    weight_decay = _validate.check_number(op, "weight_decay", weight_decay, low=0.0)
    _validate.check_flag(op, "nesterov", nesterov)
    _validate.check_flag(op, "maximize", maximize)
    if nesterov and (momentum == 0.0 or dampening != 0.0):
        raise ValueError(f"{op}: nesterov=True needs momentum > 0 and dampening = 0, got momentum={momentum}, dampening={dampening}")
    max_norm = check_clip(op, norm, max_norm)
    check_amp(op, grad_scale, found_inf)
    buffers: TensorsOrNone | None = momentum_buffers if momentum != 0.0 else None
    if buffers is None and momentum != 0.0:
        raise TypeError(f"{op}: momentum_buffers must be a list of tensors or None, got {_validate.describe(momentum_buffers)}")
    # Whole lists before they are cut into parts: messages carry the caller's indices.
    given: dict[str, Tensors | None] = {"params": params, "grads": grads, "old_params": old_params}
    if buffers is not None:
        check_with_gaps(op, given, "momentum_buffers", buffers, written=("params", "momentum_buffers"))
    elif not are_trusted(given.values()):
        _validate.check_lists(op, given, written=("params",))
    prepared = []
    for first_step, indices in first_and_later(buffers):
        # Zeros, for a device on which a skipped first step is not known of without waiting: the buffer then stays, and must hold something.
        fresh = [torch.zeros_like(params[i]) for i in indices or ()] if first_step else None
        lists = {
            "params": pick(params, indices),
            "grads": pick(grads, indices),
            "old_params": pick(old_params, indices),
            "momentum_buffers": fresh if fresh is not None else pick(cast("Tensors | None", buffers), indices),
        }
        prepared.append((first_step, indices, fresh, split(lists, written=("params", "momentum_buffers"))))
    for first_step, indices, fresh, row_groups in prepared:
        stepped = True
        for rows in row_groups:
            device = device_of(rows)
            stepped = rows.backend.sgd_step_(
                rows.lists["params"],
                rows.lists["grads"],
                rows.lists["momentum_buffers"],
                old_params=rows.lists["old_params"],
                lr=number_on(lr, device),
                momentum=momentum,
                dampening=dampening,
                weight_decay=weight_decay,
                nesterov=nesterov,
                maximize=maximize,
                first_step=first_step,
                grad_scale=on(grad_scale, device),
                found_inf=on(found_inf, device),
                norm=on(norm, device),
                max_norm=max_norm,
            )
            rows.finish()
        if fresh is not None and stepped:
            for i, buffer in zip(indices or (), fresh, strict=True):
                cast("list[Tensor | None]", buffers)[i] = buffer


@operation(written=("params", "exp_avgs", "exp_avg_sqs", "state_steps"))
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
    op = "adamw_step_"
    lr = _validate.check_number_or_tensor(op, "lr", lr, low=0.0)
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"{op}: betas must be a pair of numbers, got {_validate.describe(betas)}")
    checked_betas = tuple(
        _validate.check_number(op, f"betas[{i}]", beta, low=0.0, high=1.0, open_high=True) for i, beta in enumerate(betas)
    )
    eps = _validate.check_number(op, "eps", eps, low=0.0)
    weight_decay = _validate.check_number(op, "weight_decay", weight_decay, low=0.0)
    _validate.check_flag(op, "decoupled", decoupled)
    _validate.check_flag(op, "maximize", maximize)
    max_norm = check_clip(op, norm, max_norm)
    check_amp(op, grad_scale, found_inf)
    lists = {"params": params, "grads": grads, "old_params": old_params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    row_groups = checked(op, lists, written=("params", "exp_avgs", "exp_avg_sqs"))
    if not isinstance(state_steps, TensorList):
        if not isinstance(state_steps, list | tuple):
            raise TypeError(f"{op}: state_steps must be a list or tuple of tensors, got {_validate.describe(state_steps)}")
        for i, step in enumerate(state_steps):
            _validate.check_counter(op, f"state_steps[{i}]", step)
        _validate.check_distinct(op, {"state_steps": state_steps})
    if len(state_steps) != len(params):
        raise ValueError(f"{op}: state_steps has {len(state_steps)} tensors, params has {len(params)}")
    for rows in row_groups:
        device = device_of(rows)
        rows.backend.adamw_step_(
            rows.lists["params"],
            rows.lists["grads"],
            rows.lists["exp_avgs"],
            rows.lists["exp_avg_sqs"],
            state_steps if len(rows.indices) == len(params) else [state_steps[i] for i in rows.indices],
            old_params=rows.lists["old_params"],
            lr=number_on(lr, device),
            betas=checked_betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled=decoupled,
            maximize=maximize,
            grad_scale=on(grad_scale, device),
            found_inf=on(found_inf, device),
            norm=on(norm, device),
            max_norm=max_norm,
        )
        rows.finish()
