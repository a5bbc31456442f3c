"""``torch._foreach_*`` on any device, with no compiler: the fallback. Correct first; it makes temporaries and several passes.

Arithmetic in float32 (float64 for a row that has a float64 tensor), one rounding to storage, as every backend. Nothing here waits for a
device: a step is skipped by selecting, not by branching.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sam_kernels._flags import report_norm
from sam_kernels._tensor_list import TensorList

__all__ = [
    "DEVICE_TYPES",
    "DTYPES",
    "IS_AUTOMATIC",
    "KNOWS_SKIPS",
    "adamw_step_",
    "check_finite_",
    "current_grads",
    "describe",
    "grad_norms",
    "is_current",
    "norm_roundings",
    "perturb_",
    "restore_",
    "sgd_step_",
    "vouch",
]

DEVICE_TYPES = None  # every device torch knows
DTYPES = None  # all that operations take
IS_AUTOMATIC = True
KNOWS_SKIPS = True  # on the CPU


def describe() -> str:
    """One line for ``python -m sam_kernels info``."""
    return f"torch {torch.__version__}, any device"


def vouch(tensors: Sequence[Tensor], like: TensorList | None = None) -> TensorList | None:
    """A :class:`TensorList` of these tensors, None where one of them is sparse. Torch's own operations take any strides."""
    return TensorList(tensors) if all(tensor.layout is torch.strided for tensor in tensors) else None


def current_grads(known: TensorList, params: list[Tensor]) -> TensorList | None:
    """The gradients of ``params``, vouched for; None unless they are the tensors of ``known``, each with a dense gradient."""
    grads = [param.grad for param in params]
    if not is_current(known, params) or not all(grad is not None and grad.layout is torch.strided for grad in grads):
        return None
    return TensorList(grads)  # type: ignore[arg-type]


def is_current(known: TensorList, tensors: list[Tensor]) -> bool:
    """Whether ``tensors`` are those of ``known``. Where they lie is torch's own business."""
    return len(known) == len(tensors) and all(map(operator.is_, known, tensors))


def _arithmetic_dtypes(*lists: Sequence[Tensor] | None) -> list[torch.dtype]:
    """The arithmetic type of each row."""
    rows = zip(*(tensors for tensors in lists if tensors is not None), strict=True)
    return [torch.float64 if any(t.dtype is torch.float64 for t in row) else torch.float32 for row in rows]


def _widen(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], *, copy: bool = False) -> list[Tensor]:
    """The tensors in the arithmetic type: themselves where they are of it, unless a ``copy`` is asked for."""
    return [tensor.to(dtype, copy=copy) for tensor, dtype in zip(tensors, dtypes, strict=True)]


def _write(destinations: Sequence[Tensor], results: Sequence[Tensor], skip: Tensor | None) -> None:
    """Rounds the results once into their destinations, where they are not these already, except where the step is skipped."""
    for destination, result in zip(destinations, results, strict=True):
        if result is not destination:
            rounded = result.to(destination.dtype)
            destination.copy_(rounded if skip is None else torch.where(skip, destination, rounded))


def _is_host(scalar: Tensor) -> bool:
    """Whether reading a number waits for nobody."""
    return scalar.device.type == "cpu"


def _skip(norm: Tensor | None, found_inf: Tensor | None) -> Tensor | Literal[True] | None:
    """Whether to skip: known on the CPU, () bool on another device, None where nothing can ask for it."""
    flags = []
    if norm is not None:
        flags.append(~torch.isfinite(norm.reshape(())))
    if found_inf is not None:
        flags.append(found_inf.reshape(()) != 0)
    if not flags:
        return None
    skip = flags[0] if len(flags) == 1 else flags[0] | flags[1]
    if _is_host(skip):
        return True if bool(skip) else None
    return skip


def _number(scalar: Tensor) -> Tensor | float:
    return float(scalar) if _is_host(scalar) else scalar


def _scale_(tensors: Sequence[Tensor], factor: Tensor | float) -> None:
    if isinstance(factor, float):
        torch._foreach_mul_(list(tensors), factor)
    else:
        for tensor in tensors:
            tensor.mul_(factor.to(tensor.dtype))


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


def norm_roundings(numels: Sequence[int]) -> None:
    """float32 roundings that a term of a norm passes through: none, sums are in float64."""


def check_finite_(grads: Sequence[Tensor], found_inf: Tensor) -> None:
    """Sets found_inf where a gradient is not finite. Reads g."""
    for norm in torch._foreach_norm(list(grads), ord=torch.inf):
        report_norm(norm, found_inf, None, None)


def _start(
    params: Sequence[Tensor], old_params: Sequence[Tensor] | None, dtypes: Sequence[torch.dtype], skip: Tensor | None
) -> list[Tensor]:
    """What an operation starts from, in the arithmetic type, to be changed in place: the parameters, restored first where there are
    ``old_params``, or a copy of a backup that is of a wider type than its parameter."""
    if old_params is None:
        return _widen(params, dtypes, copy=skip is not None)
    restore_(params, old_params)
    sources = [old if old.dtype is not param.dtype else param for param, old in zip(params, old_params, strict=True)]
    copies = [source is not param or skip is not None for source, param in zip(sources, params, strict=True)]
    return [source.to(dtype, copy=copy) for source, dtype, copy in zip(sources, dtypes, copies, strict=True)]


def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    old_params: Sequence[Tensor],
    norm: Tensor,  # ()
    *,
    rho: float,
    lambd: float,
    adaptive: bool,
    eta: float,
    eps: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    from_old: bool,
) -> None:
    """See :func:`sam_kernels.functional.perturb_`."""
    skip = _skip(norm, found_inf)
    if not from_old:
        torch._foreach_copy_(list(old_params), list(params))
    if skip is True:
        if from_old:
            restore_(params, old_params)
        return
    dtypes = _arithmetic_dtypes(params, grads, old_params)
    # Scalars in float64 whatever they are given in: a float64 row takes part in that precision.
    inverse = 1.0 if grad_scale is None else 1.0 / grad_scale.reshape(()).to(torch.float64)
    scale = _number(rho * ((1.0 - lambd) + lambd / (norm.reshape(()).to(torch.float64) * inverse + eps)) * inverse)
    results = _start(params, old_params if from_old else None, dtypes, skip)
    steps = _widen(grads, dtypes)
    if adaptive:
        weights = torch._foreach_abs(results)
        torch._foreach_add_(weights, eta)
        torch._foreach_mul_(weights, weights)
        torch._foreach_mul_(weights, steps)
        _scale_(weights, scale)
        torch._foreach_add_(results, weights)
    elif isinstance(scale, float):
        torch._foreach_add_(results, steps, alpha=scale)
    else:
        torch._foreach_add_(results, [step * scale.to(step.dtype) for step in steps])
    _write(params, results, skip)


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
    number = _number(factor)
    changes = number != 1.0 if isinstance(number, float) else maximize or inverse is not None or max_norm is not None
    updates = _widen(grads, dtypes, copy=changes)
    if changes:
        _scale_(updates, number)
    return updates


def sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    *,
    old_params: Sequence[Tensor] | None,
    lr: float,
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
    skip = _skip(norm, found_inf)
    if skip is True:
        if old_params is not None:
            restore_(params, old_params)
        return False
    dtypes = _arithmetic_dtypes(params, grads, old_params, momentum_buffers)
    results = _start(params, old_params, dtypes, skip)
    updates = _grad_updates(grads, dtypes, maximize=maximize, grad_scale=grad_scale, norm=norm, max_norm=max_norm)
    if weight_decay != 0:
        updates = list(torch._foreach_add(updates, results, alpha=weight_decay))
    if momentum_buffers is not None:
        buffers = _widen(momentum_buffers, dtypes, copy=skip is not None)
        if first_step:
            torch._foreach_copy_(buffers, updates)
        else:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, updates, alpha=1.0 - dampening)
        updates = list(torch._foreach_add(updates, buffers, alpha=momentum)) if nesterov else buffers
        torch._foreach_add_(results, updates, alpha=-lr)
        _write(momentum_buffers, buffers, skip)
    else:
        torch._foreach_add_(results, updates, alpha=-lr)
    _write(params, results, skip)
    return True


def adamw_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    old_params: Sequence[Tensor] | None,
    lr: float,
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
    skip = _skip(norm, found_inf)
    if skip is True:
        if old_params is not None:
            restore_(params, old_params)
        return False
    dtypes = _arithmetic_dtypes(params, grads, old_params, exp_avgs, exp_avg_sqs)
    results = _start(params, old_params, dtypes, skip)
    updates = _grad_updates(grads, dtypes, maximize=maximize, grad_scale=grad_scale, norm=norm, max_norm=max_norm)
    if weight_decay != 0:
        if decoupled:
            torch._foreach_mul_(results, 1.0 - lr * weight_decay)
        else:
            updates = list(torch._foreach_add(updates, results, alpha=weight_decay))
    beta1, beta2 = betas
    steps = [step + 1 if skip is None else torch.where(skip.to(step.device), step, step + 1) for step in state_steps]
    torch._foreach_copy_(list(state_steps), steps)
    new_exp_avgs = _widen(exp_avgs, dtypes, copy=skip is not None)
    torch._foreach_lerp_(new_exp_avgs, updates, 1.0 - beta1)
    new_exp_avg_sqs = _widen(exp_avg_sqs, dtypes, copy=skip is not None)
    torch._foreach_mul_(new_exp_avg_sqs, beta2)
    torch._foreach_addcmul_(new_exp_avg_sqs, updates, updates, 1.0 - beta2)
    denominators = torch._foreach_sqrt(new_exp_avg_sqs)
    times = [step.to(torch.float64).reshape(()) for step in steps]
    if all(_is_host(t) for t in times):
        numbers = [t.item() for t in times]
        torch._foreach_div_(denominators, [(1.0 - beta2**t) ** 0.5 for t in numbers])
        torch._foreach_add_(denominators, eps)
        torch._foreach_addcdiv_(results, new_exp_avgs, denominators, [-lr / (1.0 - beta1**t) for t in numbers])
    else:
        for result, exp_avg, denominator, t in zip(results, new_exp_avgs, denominators, times, strict=True):
            step_size = (lr / (1.0 - beta1**t)).to(device=result.device, dtype=result.dtype)
            correction = (1.0 - beta2**t).sqrt().to(device=result.device, dtype=result.dtype)
            result.sub_(step_size * (exp_avg / (denominator / correction + eps)))
    _write(exp_avgs, new_exp_avgs, skip)
    _write(exp_avg_sqs, new_exp_avg_sqs, skip)
    _write(params, results, skip)
    return True
