"""Norms, the ascent, the way back and the descent. Correct first: temporaries and several passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_kernels._flags import report_norm
from sam_kernels._tensor_list import arithmetic_dtype
from sam_kernels.backends.foreach._rows import (
    add_scaled_,
    arithmetic_dtypes,
    asam_weights,
    exact,
    is_host,
    norms_of,
    number_of,
    rows_of,
    scale_,
    skip_of,
    start,
    wide,
    widen,
    write,
)
from sam_kernels.backends.foreach.directions import weighted_directions
from sam_kernels.backends.foreach.random import rounded_stochastically
from sam_kernels.operations import AdamWStep, CheckFinite, Descent, GradNorms, Operands, Perturb, Restore, SgdStep

__all__ = ["adamw_step_", "check_finite_", "grad_norms", "perturb_", "restore_", "sgd_step_"]

# A weight w that is less than 1/2 in float32 too. From 1/2 on torch.lerp computes b - (1 - w) (b - a), which is NaN for an infinite b.
_LERP_BELOW = 0.5 - 2.0**-25


def grad_norms(op: GradNorms, lists: Operands) -> Tensor:  # (len(group_sizes),) float32, float64 where a gradient is float64
    """See :class:`sam_kernels.operations.GradNorms`. Summed in float64."""
    norms = torch.split(torch.stack(norms_of(op, lists["grads"], lists)), list(op.group_sizes))
    stacked = torch.stack([torch.linalg.vector_norm(group) for group in norms]).to(arithmetic_dtype(lists["grads"]))
    return stacked if len(stacked) != 1 else report_norm(stacked[0], op.found_inf, op.skipped, op.out).reshape(1)


def check_finite_(op: CheckFinite, lists: Operands) -> None:
    """See :class:`sam_kernels.operations.CheckFinite`."""
    filled = [grad for grad in lists["grads"] if grad.numel() > 0]  # torch knows no largest element of nothing
    for norm in torch._foreach_norm(filled, ord=torch.inf) if filled else ():
        report_norm(norm, op.found_inf)


def perturb_(op: Perturb, lists: Operands) -> None:
    """See :class:`sam_kernels.operations.Perturb`."""
    params, old_params = lists["params"], lists["old_params"]
    skip = skip_of(op.norm, op.found_inf)
    if not op.from_old:
        torch._foreach_copy_(list(old_params), list(params))
    if skip is True:
        if op.from_old:
            _restore(params, old_params)
        return
    dtypes = arithmetic_dtypes(op, lists)
    # Scalars in float64 whatever they are given in: a float64 row takes part in that precision.
    rho, lambd = exact(op.rho), exact(op.lambd)
    inverse = 1.0 if op.grad_scale is None else 1.0 / wide(op.grad_scale)
    if "ema" in lists:  # the direction and its norm are unscaled
        steps, inverse = weighted_directions(op, lists, dtypes, inverse), 1.0
    else:
        steps = widen(lists["grads"], dtypes)
    scale = number_of(rho * ((1.0 - lambd) + lambd / (wide(op.norm) * inverse + op.eps)) * inverse)
    results = start(params, old_params if op.from_old else None, dtypes, skip)
    if op.adaptive:
        weights = asam_weights(results, op.eta)
        torch._foreach_mul_(weights, weights)
        torch._foreach_mul_(weights, steps)
        scale_(weights, scale)
        torch._foreach_add_(results, weights)
    else:
        add_scaled_(results, steps, scale)
    if op.rounding_seed is not None:
        results = rounded_stochastically(results, rows_of(op, lists), lists.indices, op.rounding_seed)
    write(params, results, skip)


def restore_(op: Restore, lists: Operands) -> None:
    """See :class:`sam_kernels.operations.Restore`."""
    _restore(lists["params"], lists["old_params"])


def _restore(params: Sequence[Tensor], old_params: Sequence[Tensor] | None) -> None:
    if old_params is not None:
        torch._foreach_copy_(list(params), list(old_params))


def _grad_updates(op: Descent, grads: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Gradients in the arithmetic type, unscaled, clipped and signed: the caller's own tensors where nothing is to be done to them."""
    factor = torch.full((), -1.0 if op.maximize else 1.0, dtype=torch.float64, device=grads[0].device)
    inverse = 1.0 if op.grad_scale is None else 1.0 / wide(op.grad_scale)
    factor = factor * inverse
    if op.norm is not None and op.max_norm is not None:
        factor = factor * torch.clamp(op.max_norm / (wide(op.norm) * inverse + 1e-6), max=1.0)
    number = number_of(factor)
    changes = number != 1.0 if isinstance(number, float) else op.maximize or op.grad_scale is not None or op.max_norm is not None
    updates = widen(grads, dtypes, copy=changes)
    if changes:
        scale_(updates, number)
    return updates


def _write_weights(op: Descent, lists: Operands, results: Sequence[Tensor], skip: Tensor | None) -> None:
    """An update's results to the parameters, and to their masters where these are written too."""
    if op.to_old:
        write(lists["old_params"], results, skip)
    if op.rounding_seed is not None:
        results = rounded_stochastically(results, rows_of(op, lists), lists.indices, op.rounding_seed)
    write(lists["params"], results, skip)


def sgd_step_(op: SgdStep, lists: Operands) -> bool:
    """See :class:`sam_kernels.operations.SgdStep`."""
    params, old_params, momentum_buffers = lists["params"], lists.get("old_params"), lists.get("momentum_buffers")
    skip = skip_of(op.norm, op.found_inf)
    if skip is True:
        _restore(params, old_params)
        return False
    lr, dtypes = exact(op.lr), arithmetic_dtypes(op, lists)
    results = start(params, old_params, dtypes, skip)
    updates = _grad_updates(op, lists["grads"], dtypes)
    if op.weight_decay != 0:
        updates = list(torch._foreach_add(updates, results, alpha=op.weight_decay))
    if momentum_buffers is not None:
        buffers = widen(momentum_buffers, dtypes, copy=skip is not None)
        if op.first_step:
            torch._foreach_copy_(buffers, updates)
        else:
            torch._foreach_mul_(buffers, op.momentum)
            torch._foreach_add_(buffers, updates, alpha=1.0 - op.dampening)
        updates = list(torch._foreach_add(updates, buffers, alpha=op.momentum)) if op.nesterov else buffers
        add_scaled_(results, updates, -lr)
        write(momentum_buffers, buffers, skip)
    else:
        add_scaled_(results, updates, -lr)
    _write_weights(op, lists, results, skip)
    return True


def adamw_step_(op: AdamWStep, lists: Operands) -> bool:
    """See :class:`sam_kernels.operations.AdamWStep`."""
    params, old_params, state_steps = lists["params"], lists.get("old_params"), lists["state_steps"]
    exp_avgs, exp_avg_sqs = lists["exp_avgs"], lists["exp_avg_sqs"]
    skip = skip_of(op.norm, op.found_inf)
    if skip is True:
        _restore(params, old_params)
        return False
    lr, dtypes = exact(op.lr), arithmetic_dtypes(op, lists)
    results = start(params, old_params, dtypes, skip)
    updates = _grad_updates(op, lists["grads"], dtypes)
    if op.weight_decay != 0:
        if op.decoupled:
            scale_(results, 1.0 - lr * op.weight_decay)
        else:
            updates = list(torch._foreach_add(updates, results, alpha=op.weight_decay))
    beta1, beta2 = op.betas
    steps = [step + 1 if skip is None else torch.where(skip.to(step.device), step, step + 1) for step in state_steps]
    torch._foreach_copy_(list(state_steps), steps)
    new_exp_avgs = widen(exp_avgs, dtypes, copy=skip is not None)
    if 1.0 - beta1 < _LERP_BELOW:
        torch._foreach_lerp_(new_exp_avgs, updates, 1.0 - beta1)
    else:
        torch._foreach_mul_(new_exp_avgs, beta1)
        torch._foreach_add_(new_exp_avgs, updates, alpha=1.0 - beta1)
    new_exp_avg_sqs = widen(exp_avg_sqs, dtypes, copy=skip is not None)
    torch._foreach_mul_(new_exp_avg_sqs, beta2)
    torch._foreach_addcmul_(new_exp_avg_sqs, updates, updates, 1.0 - beta2)
    denominators = torch._foreach_sqrt(new_exp_avg_sqs)
    times = [step.to(torch.float64).reshape(()) for step in steps]
    if not isinstance(lr, Tensor) and all(is_host(t) for t in times):
        numbers = [t.item() for t in times]
        torch._foreach_div_(denominators, [(1.0 - beta2**t) ** 0.5 for t in numbers])
        torch._foreach_add_(denominators, op.eps)
        torch._foreach_addcdiv_(results, new_exp_avgs, denominators, [-lr / (1.0 - beta1**t) for t in numbers])
    else:
        for result, exp_avg, denominator, t in zip(results, new_exp_avgs, denominators, times, strict=True):
            step_size = (lr / (1.0 - beta1**t)).to(device=result.device, dtype=result.dtype)
            correction = (1.0 - beta2**t).sqrt().to(device=result.device, dtype=result.dtype)
            result.sub_(step_size * (exp_avg / (denominator / correction + op.eps)))
    write(exp_avgs, new_exp_avgs, skip)
    write(exp_avg_sqs, new_exp_avg_sqs, skip)
    _write_weights(op, lists, results, skip)
    return True
