"""Norms, the ascent, the way back and the descent. Correct first: temporaries and several passes."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from sam_kernels._flags import report_norm
from sam_kernels._memory_of import without_memory
from sam_kernels._tensor_list import TensorList
from sam_kernels.backends.foreach._rows import (
    add_scaled_,
    arithmetic_dtypes,
    exact,
    is_host,
    number_of,
    scale_,
    skip_of,
    start,
    widen,
    write,
)
from sam_kernels.backends.foreach.directions import weighted_directions
from sam_kernels.backends.foreach.random import rounded_stochastically

__all__ = [
    "DEVICE_TYPES",
    "DTYPES",
    "IS_AUTOMATIC",
    "KNOWS_SKIPS",
    "REFUSES_NO_MEMORY",
    "adamw_step_",
    "check_finite_",
    "current_grads",
    "describe",
    "grad_norms",
    "is_current",
    "perturb_",
    "restore_",
    "sgd_step_",
    "vouch",
]

DEVICE_TYPES = None  # every device torch knows
DTYPES = None  # all that operations take
IS_AUTOMATIC = True
KNOWS_SKIPS = True  # on the CPU
REFUSES_NO_MEMORY = False  # torch reads what it is given


def describe() -> str:
    """One line for ``python -m sam_kernels info``."""
    return f"torch {torch.__version__}, any device"


def vouch(tensors: Sequence[Tensor], like: TensorList | None = None) -> TensorList | None:
    """A :class:`TensorList` of these tensors, None where one is sparse or has no memory. Torch's own operations take any strides."""
    if without_memory(tensors) or not all(tensor.layout is torch.strided for tensor in tensors):
        return None
    return TensorList(tensors)


def current_grads(known: TensorList, params: list[Tensor]) -> TensorList | None:
    """The gradients of ``params``, vouched for; None unless they are the tensors of ``known``, each with a dense gradient."""
    grads = [param.grad for param in params]
    if not is_current(known, params) or not all(grad is not None and grad.layout is torch.strided for grad in grads):
        return None
    return None if without_memory(grads) else TensorList(grads)  # type: ignore[arg-type]  # none of them is None


def is_current(known: TensorList, tensors: list[Tensor]) -> bool:
    """Whether ``tensors`` are those of ``known``. Where they lie is torch's own business."""
    return len(known) == len(tensors) and all(map(operator.is_, known, tensors))


def grad_norms(
    grads: Sequence[Tensor],
    params: Sequence[Tensor] | None,
    group_sizes: Sequence[int],
    *,
    adaptive: bool,
    eta: float,
    found_inf: Tensor | None,
    skipped: Tensor | None,
    out: Tensor | None,
) -> Tensor:  # (len(group_sizes),) float32, float64 where a gradient is float64
    """Norms of consecutive groups of rows, summed in float64, reported where there is one."""
    dtype = torch.float64 if any(grad.dtype is torch.float64 for grad in grads) else torch.float32
    tensors: list[Tensor] | tuple[Tensor, ...] = [g.to(torch.float64) for g in grads]
    if adaptive and params is not None:
        weights = torch._foreach_abs([p.to(torch.float64) for p in params])
        torch._foreach_add_(weights, eta)
        tensors = torch._foreach_mul(weights, tensors)
    norms = torch._foreach_norm(tensors) if len(tensors) else []
    result, start = [], 0
    for size in group_sizes:
        group = [norm.to(norms[start].device) for norm in norms[start : start + size]]
        device = grads[0].device if len(grads) else None
        result.append(torch.linalg.vector_norm(torch.stack(group)) if group else torch.zeros((), dtype=torch.float64, device=device))
        start += size
    stacked = torch.stack(result).to(dtype)
    return stacked if len(result) != 1 else report_norm(stacked[0], found_inf, skipped, out).reshape(1)


def check_finite_(grads: Sequence[Tensor], found_inf: Tensor) -> None:
    """Sets found_inf where a gradient is not finite. Reads g."""
    filled = [grad for grad in grads if grad.numel() > 0]  # torch knows no largest element of nothing
    for norm in torch._foreach_norm(filled, ord=torch.inf) if filled else ():
        report_norm(norm, found_inf, None, None)


def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    old_params: Sequence[Tensor],
    norm: Tensor,  # ()
    *,
    rho: float | Tensor,  # ()
    lambd: float | Tensor,  # ()
    adaptive: bool,
    eta: float,
    eps: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    from_old: bool,
    ema: Sequence[Tensor] | None,
    grad_weight: float,
    ema_weight: float,
    rounding_seed: int | None,
    row_indices: Sequence[int],
) -> None:
    """See :func:`sam_kernels.functional.perturb_`. With ``ema``, m, the direction is grad_weight g / grad_scale + ema_weight m."""
    skip = skip_of(norm, found_inf)
    if not from_old:
        torch._foreach_copy_(list(old_params), list(params))
    if skip is True:
        if from_old:
            restore_(params, old_params)
        return
    dtypes = arithmetic_dtypes(params, grads, old_params, ema)
    # Scalars in float64 whatever they are given in: a float64 row takes part in that precision.
    rho, lambd = exact(rho), exact(lambd)
    inverse = 1.0 if grad_scale is None else 1.0 / grad_scale.reshape(()).to(torch.float64)
    if ema is not None:  # the direction and its norm are unscaled
        steps, inverse = weighted_directions(grads, ema, dtypes, inverse, grad_weight, ema_weight), 1.0
    else:
        steps = widen(grads, dtypes)
    scale = number_of(rho * ((1.0 - lambd) + lambd / (norm.reshape(()).to(torch.float64) * inverse + eps)) * inverse)
    results = start(params, old_params if from_old else None, dtypes, skip)
    if adaptive:
        weights = torch._foreach_abs(results)
        torch._foreach_add_(weights, eta)
        torch._foreach_mul_(weights, weights)
        torch._foreach_mul_(weights, steps)
        scale_(weights, scale)
        torch._foreach_add_(results, weights)
    else:
        add_scaled_(results, steps, scale)
    if rounding_seed is not None:
        rows = list(zip(*(tensors for tensors in (params, grads, old_params, ema) if tensors is not None), strict=True))
        results = rounded_stochastically(results, rows, row_indices, rounding_seed)
    write(params, results, skip)


def restore_(params: Sequence[Tensor], old_params: Sequence[Tensor]) -> None:
    """See :func:`sam_kernels.functional.restore_`."""
    torch._foreach_copy_(list(params), list(old_params))


def _grad_updates(
    grads: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    *,
    maximize: bool,
    grad_scale: Tensor | None,
    norm: Tensor | None,
    max_norm: float | None,
) -> list[Tensor]:
    """Gradients in the arithmetic type, unscaled, clipped and signed: the caller's own tensors where nothing is to be done to them."""
    factor = torch.full((), -1.0 if maximize else 1.0, dtype=torch.float64, device=grads[0].device)
    inverse = None if grad_scale is None else 1.0 / grad_scale.reshape(()).to(torch.float64)
    if inverse is not None:
        factor = factor * inverse
    if norm is not None and max_norm is not None:
        unscaled = norm.reshape(()).to(torch.float64) * (1.0 if inverse is None else inverse)
        factor = factor * torch.clamp(max_norm / (unscaled + 1e-6), max=1.0)
    number = number_of(factor)
    changes = number != 1.0 if isinstance(number, float) else maximize or inverse is not None or max_norm is not None
    updates = widen(grads, dtypes, copy=changes)
    if changes:
        scale_(updates, number)
    return updates


def sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    *,
    old_params: Sequence[Tensor] | None,
    lr: float | Tensor,  # ()
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    norm: Tensor | None,
    max_norm: float | None,
) -> bool:
    """See :func:`sam_kernels.functional.sgd_step_`."""
    skip = skip_of(norm, found_inf)
    if skip is True:
        if old_params is not None:
            restore_(params, old_params)
        return False
    lr = exact(lr)
    dtypes = arithmetic_dtypes(params, grads, old_params, momentum_buffers)
    results = start(params, old_params, dtypes, skip)
    updates = _grad_updates(grads, dtypes, maximize=maximize, grad_scale=grad_scale, norm=norm, max_norm=max_norm)
    if weight_decay != 0:
        updates = list(torch._foreach_add(updates, results, alpha=weight_decay))
    if momentum_buffers is not None:
        buffers = widen(momentum_buffers, dtypes, copy=skip is not None)
        if first_step:
            torch._foreach_copy_(buffers, updates)
        else:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, updates, alpha=1.0 - dampening)
        updates = list(torch._foreach_add(updates, buffers, alpha=momentum)) if nesterov else buffers
        add_scaled_(results, updates, -lr)
        write(momentum_buffers, buffers, skip)
    else:
        add_scaled_(results, updates, -lr)
    write(params, results, skip)
    return True


def adamw_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    old_params: Sequence[Tensor] | None,
    lr: float | Tensor,  # ()
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    norm: Tensor | None,
    max_norm: float | None,
) -> bool:
    """See :func:`sam_kernels.functional.adamw_step_`."""
    skip = skip_of(norm, found_inf)
    if skip is True:
        if old_params is not None:
            restore_(params, old_params)
        return False
    lr = exact(lr)
    dtypes = arithmetic_dtypes(params, grads, old_params, exp_avgs, exp_avg_sqs)
    results = start(params, old_params, dtypes, skip)
    updates = _grad_updates(grads, dtypes, maximize=maximize, grad_scale=grad_scale, norm=norm, max_norm=max_norm)
    if weight_decay != 0:
        if decoupled:
            scale_(results, 1.0 - lr * weight_decay)
        else:
            updates = list(torch._foreach_add(updates, results, alpha=weight_decay))
    beta1, beta2 = betas
    steps = [step + 1 if skip is None else torch.where(skip.to(step.device), step, step + 1) for step in state_steps]
    torch._foreach_copy_(list(state_steps), steps)
    new_exp_avgs = widen(exp_avgs, dtypes, copy=skip is not None)
    torch._foreach_lerp_(new_exp_avgs, updates, 1.0 - beta1)
    new_exp_avg_sqs = widen(exp_avg_sqs, dtypes, copy=skip is not None)
    torch._foreach_mul_(new_exp_avg_sqs, beta2)
    torch._foreach_addcmul_(new_exp_avg_sqs, updates, updates, 1.0 - beta2)
    denominators = torch._foreach_sqrt(new_exp_avg_sqs)
    times = [step.to(torch.float64).reshape(()) for step in steps]
    if not isinstance(lr, Tensor) and all(is_host(t) for t in times):
        numbers = [t.item() for t in times]
        torch._foreach_div_(denominators, [(1.0 - beta2**t) ** 0.5 for t in numbers])
        torch._foreach_add_(denominators, eps)
        torch._foreach_addcdiv_(results, new_exp_avgs, denominators, [-lr / (1.0 - beta1**t) for t in numbers])
    else:
        for result, exp_avg, denominator, t in zip(results, new_exp_avgs, denominators, times, strict=True):
            step_size = (lr / (1.0 - beta1**t)).to(device=result.device, dtype=result.dtype)
            correction = (1.0 - beta2**t).sqrt().to(device=result.device, dtype=result.dtype)
            result.sub_(step_size * (exp_avg / (denominator / correction + eps)))
    write(exp_avgs, new_exp_avgs, skip)
    write(exp_avg_sqs, new_exp_avg_sqs, skip)
    write(params, results, skip)
    return True
