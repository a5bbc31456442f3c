"""The descent: restore and update in one pass."""

from __future__ import annotations

import dataclasses
from typing import TypeVar, cast

from torch import Tensor

from sam_kernels import _validate
from sam_kernels._grouping import run, split
from sam_kernels._tensor_list import TensorList
from sam_kernels.functional._common import (
    Tensors,
    TensorsOrNone,
    by_first_step,
    check_lists,
    check_with_gaps,
    checked,
)
from sam_kernels.functional._flat import BACKUPS, MOMENTUM
from sam_kernels.functional._library import operation
from sam_kernels.functional._masters import check_masters, check_rounding
from sam_kernels.operations import AdamWStep, Number, SgdStep

__all__ = ["adamw_step_", "sgd_step_"]

_Step = TypeVar("_Step", SgdStep, AdamWStep)


@operation(written=SgdStep.written, scheduled=("rounding_seed",), flat=MOMENTUM)
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
    to_old: bool = False,
    rounding_seed: int | None = None,
) -> None:
    """Restore and ``torch.optim.SGD`` in one pass: the step is made from ``old_params`` (where given) and written to ``params``.

    ``momentum_buffers`` is ignored where ``momentum`` is 0. An entry that is None is a first step: the buffer becomes the update itself,
    without dampening, and is put into the list (as zeros if the step is skipped where that cannot be known without waiting for a device,
    and under ``torch.compile``).
    ``grad_scale`` divides the gradients; ``max_norm`` (needs ``norm``) multiplies them by
    min(1, max_norm / (norm / grad_scale + 1e-6)). Where ``found_inf`` is set or ``norm`` is not finite, parameters are restored and nothing
    else happens.
    ``to_old``: ``old_params`` are float32 masters of bfloat16 or float16 parameters, all of them: the step is written to them, and rounded
    once to ``params``. A momentum buffer that is made is float32 then. A skipped step leaves masters and buffers, and rounds the masters to
    ``params``. ``rounding_seed`` (in [0, 2^64)): bfloat16 parameters are rounded stochastically, with or without masters, by the random
    words of :func:`perturb_`: of one seed both use the same words. What is restored is rounded as usual. float16 parameters are refused.
    Reads old_p (else p), g, m; writes p, m: 5 N s bytes; ``to_old``: writes old_p too, with 16-bit g and float32 m 20 N.
    Raises TypeError for a row of ``to_old`` with other dtypes, ValueError for ``to_old`` without ``old_params``.
    """
    op = checked(
        SgdStep(
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
            to_old=to_old,
            rounding_seed=rounding_seed,
        )
    )
    if max_norm is not None and norm is None:
        raise _missing_norm(op.name)
    if nesterov and (op.momentum == 0.0 or op.dampening != 0.0):
        raise ValueError(
            f"{op.name}: nesterov=True needs momentum > 0 and dampening = 0, got momentum={op.momentum}, dampening={op.dampening}"
        )
    buffers: TensorsOrNone | None = momentum_buffers if op.momentum != 0.0 else None
    if buffers is None and op.momentum != 0.0:
        raise TypeError(f"{op.name}: momentum_buffers must be a list of tensors or None, got {_validate.describe(momentum_buffers)}")
    # Whole lists before they are cut into parts: messages carry the caller's indices.
    lists: dict[str, Tensors | None] = {"params": params, "grads": grads, "old_params": old_params}
    if buffers is not None:
        check_with_gaps(op, lists, "momentum_buffers", buffers)
    else:
        check_lists(op, lists)
    op = _check_narrow(op, params, old_params)
    if buffers is None or isinstance(buffers, TensorList):
        run(op, {**lists, "momentum_buffers": buffers})
    else:
        _sgd_with_gaps(op, lists, buffers)


def _sgd_with_gaps(op: SgdStep, lists: dict[str, Tensors | None], buffers: list[Tensor | None]) -> None:
    """Rows whose buffer is None make their first step."""
    # Zeros, for a device on which a skipped first step is not known of without waiting: the buffer then stays, and must hold something.
    groups = by_first_step(lists, "momentum_buffers", buffers, like="old_params" if op.to_old else "params")
    prepared = [(rows, split(rows.lists, written=op.writes, indices=rows.indices)) for rows in groups]
    for rows, parts in prepared:  # after all lists are known to have a backend
        mine = dataclasses.replace(op, first_step=rows.is_first)
        stepped = True
        for part in parts:
            stepped = part.run(mine)
        if rows.is_first and stepped:
            rows.put_back("momentum_buffers", buffers)


def _check_narrow(op: _Step, params: Tensors, old_params: Tensors | None) -> _Step:
    """``op`` with its seed as an int, after the checks of masters and of stochastic rounding."""
    if op.to_old:
        check_masters(op.name, params, old_params)
    if op.rounding_seed is None:
        return op
    return dataclasses.replace(op, rounding_seed=check_rounding(op.name, op.rounding_seed, params))


def _missing_norm(op: str) -> ValueError:
    return ValueError(f"{op}: max_norm needs norm, the norm of the gradients as given")


@operation(written=(*AdamWStep.written, "state_steps"), scheduled=("rounding_seed",), flat=BACKUPS)
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
    to_old: bool = False,
    rounding_seed: int | None = None,
) -> None:
    """Restore and ``torch.optim.AdamW`` (``decoupled``) or ``Adam`` in one pass, from ``old_params`` (where given) to ``params``.

    Adds one to every ``state_steps``. ``grad_scale``, ``found_inf``, ``norm``, ``max_norm``, ``to_old`` and ``rounding_seed`` as in
    :func:`sgd_step_`.
    Reads old_p (else p), g, m, v; writes p, m, v: 7 N s bytes; ``to_old``: writes old_p too, with 16-bit g and float32 m, v 28 N.
    """
    name = AdamWStep.name
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"{name}: betas must be a pair of numbers, got {_validate.describe(betas)}")
    beta1 = _validate.check_number(name, "betas[0]", betas[0], low=0.0, high=1.0, open_high=True)
    beta2 = _validate.check_number(name, "betas[1]", betas[1], low=0.0, high=1.0, open_high=True)
    op = checked(
        AdamWStep(
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
            to_old=to_old,
            rounding_seed=rounding_seed,
        )
    )
    if max_norm is not None and norm is None:
        raise _missing_norm(op.name)
    lists = {"params": params, "grads": grads, "old_params": old_params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    check_lists(op, lists)
    op = _check_narrow(op, params, old_params)
    _check_steps(name, state_steps, len(params))
    for part in split(lists, written=op.writes):
        indices = part.lists.indices
        counters = state_steps if len(indices) == len(params) else [state_steps[i] for i in indices]
        part.lists["state_steps"] = cast("list[Tensor]", counters)
        part.run(op)


def _check_steps(name: str, state_steps: Tensors, count: int) -> None:
    if not isinstance(state_steps, TensorList):
        if not isinstance(state_steps, list | tuple):
            raise TypeError(f"{name}: state_steps must be a list or tuple of tensors, got {_validate.describe(state_steps)}")
        for i, step in enumerate(state_steps):
            _validate.check_counter(name, f"state_steps[{i}]", step)
        _validate.check_distinct(name, {"state_steps": state_steps})
    if len(state_steps) != count:
        raise ValueError(f"{name}: state_steps has {len(state_steps)} tensors, params has {count}")
