"""Bounds of the results of one call: the reference formulas evaluated on :class:`Rounded`, for all rows at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from sam_kernels._tensor_list import slice_sizes
from sam_kernels.reference import combinations, directions, ops, random
from sam_kernels.validation.options import SCHEDULED, adapted, is_rounded_stochastically
from sam_kernels.validation.problem import Problem
from sam_kernels.validation.tolerance import Arithmetic, Rounded, mean_bound, ulp

__all__ = ["accepted", "bounds_of"]

_COMPUTE_ANYWAY = ("combine_", "grad_dots", "direction_norm_")  # a flag that is set stops them not, or not from computing a norm


def accepted(formula: Callable[..., Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords that a formula of the reference takes."""
    names = signature(formula).parameters
    return {name: value for name, value in keywords.items() if name in names}


def bounds_of(problem: Problem, roundings: Sequence[int] | None = None) -> dict[str, list[Tensor]]:
    """Return a bound (numel,) for each tensor of each list that a call, not yet made, will compute. A list without bounds must be exact.

    "terms" are the bounds of the numbers whose squares or products are summed to the result.

    ``roundings``: of each tensor's means, on a backend that sums them in float32 (:func:`roundings_of`).
    """
    if problem.op == "centralize_":
        return _centralized_bounds(problem, roundings)
    skipped = ops.is_skipped(problem.kwargs.get("norm"), problem.kwargs.get("found_inf"))
    if problem.op in ("grad_norm", "grad_norms", "restore_") or (skipped and problem.op not in _COMPUTE_ANYWAY):
        return {}
    lengths = _first(problem)
    count = len(lengths)
    buffers = problem.lists.get("momentum_buffers", problem.lists.get("ema"))
    first = [i for i in range(count) if buffers is not None and buffers[i] is None]
    later = sorted(set(range(count)) - set(first))
    result: dict[str, list[Tensor]] = {}
    for indices in (first, later):
        numels = [_numel(lengths[i]) for i in indices]
        for name, flat in _flat_bounds(problem, indices).items() if sum(numels) else ():
            rows = result.setdefault(name, [torch.zeros(0, dtype=torch.float64)] * count)
            for i, bound in zip(indices, torch.split(flat, numels), strict=True):
                rows[i] = bound
    if problem.op == "combine_":  # the norm is computed in any case; a list may hold the very tensors that are written
        outs = result.pop("outs", [])
        same = [name for name, tensors in problem.lists.items() if all(t is out for t, out in zip(tensors, lengths, strict=True))]
        result |= {} if skipped or not outs else dict.fromkeys(same, outs)
    return result


def _first(problem: Problem) -> list[Tensor | None]:
    """A list whose tensors have the sizes of all rows."""
    return problem.lists.get("params") or next(iter(problem.lists.values()))


def _flat_bounds(problem: Problem, indices: list[int]) -> dict[str, Tensor]:
    """Bounds of the rows' elements, one after the other. The formulas of the reference accept :class:`Rounded` in place of tensors."""
    op, lists = problem.op, problem.lists
    numels = [_numel(_first(problem)[i]) for i in indices]
    is_double = [any(t is not None and t.dtype is torch.float64 for t in _row(problem, i)) for i in indices]
    arithmetic = Arithmetic.of(_spread(torch.tensor(is_double), numels))
    keywords: dict[str, Any] = {name: float(value) if name in SCHEDULED else value for name, value in problem.kwargs.items()}
    if (norm := problem.kwargs.get("norm")) is not None:  # rounded once into the arithmetic
        value = norm.to(torch.float64)
        keywords["norm"] = Rounded(value, value.abs() * arithmetic.unit / 2, arithmetic)

    def operand(name: str) -> Any:
        flat = [t.reshape(-1).to(torch.float64) for t in (lists[name][i] for i in indices) if t is not None] if name in lists else []
        return Rounded.exact(torch.cat(flat), arithmetic) if flat else None

    def evaluated(formula: Callable[..., Any], *operands: Any) -> Any:
        return formula(*operands, **accepted(formula, keywords))

    if op == "grad_dots":
        right, origin = operand("rights"), operand("origins")
        return {"terms": torch.zeros_like(right.value) if origin is None else (right - origin).error}
    if op == "combine_":
        error = evaluated(combinations.combined, operand("lefts"), operand("rights"), operand("origins")).error
        return {"outs": error, "terms": error}
    grad, param = operand("grads"), operand("params")
    if "ema" in lists and "grad_scale" in keywords:  # directions are made of the gradient without its scale
        grad = grad / keywords.pop("grad_scale")
    if op == "direction_norm_":
        direction, average = evaluated(directions.direction_updated, grad, operand("ema"))
        return {"ema": torch.where(grad.value.isfinite(), average.error, 0.0), "terms": adapted(direction, param, keywords).error}
    if keywords.get("from_old", op in ("sgd_step_", "adamw_step_") and "old_params" in lists):
        param = operand("old_params")
    if op == "random_perturb_":
        moved: Any = random.randomly_perturbed(param, _random_numbers(problem, arithmetic), keywords["scale"])
        return {"params": moved.error}
    if op == "perturb_":
        direction = evaluated(directions.direction_used, grad, operand("ema")) if "ema" in lists else grad
        moved = evaluated(ops.perturbed, param, direction)
        return {"params": _stored_error(problem, moved, indices, numels)}
    grad = evaluated(ops.descent_gradient, grad)
    if op == "sgd_step_":
        updated = evaluated(ops.sgd_updated, param, grad, operand("momentum_buffers") if keywords.get("momentum", 0.0) else None)
    else:
        steps = torch.stack([t.to(torch.float64) for t in (lists["state_steps"][i] for i in indices) if t is not None])
        updated = evaluated(ops.adamw_updated, param, grad, operand("exp_avgs"), operand("exp_avg_sqs"), _spread(steps, numels) + 1)
    names = ("momentum_buffers",) if op == "sgd_step_" else ("exp_avgs", "exp_avg_sqs")
    bounds = {name: rounded.error for name, rounded in zip(names, updated[1:], strict=True) if rounded is not None}
    if keywords.get("to_old", False):
        bounds["old_params"] = updated[0].error
    return {"params": _stored_error(problem, updated[0], indices, numels), **bounds}


def _centralized_bounds(problem: Problem, roundings: Sequence[int] | None) -> dict[str, list[Tensor]]:
    """Of the centralised gradients, and of the terms whose squares are summed."""
    bounds: dict[str, list[Tensor]] = {"grads": [], "terms": []}
    lists: Any = problem.lists  # none of these entries is None
    for i, (grad, size) in enumerate(zip(lists["grads"], slice_sizes(lists["grads"]), strict=True)):
        flat = grad.reshape(-1).to(torch.float64)
        is_double = torch.full_like(flat, any(t is not None and t.dtype is torch.float64 for t in _row(problem, i)), dtype=torch.bool)
        centred: Any = Rounded.exact(flat, Arithmetic.of(is_double))
        if size > 0:
            centred = centred - mean_bound(centred, size, None if roundings is None else roundings[i])
        bounds["grads"].append(centred.error)
        param = Rounded.exact(lists["params"][i].reshape(-1).to(torch.float64), centred.arithmetic)
        centred = adapted(centred, param, problem.kwargs)
        bounds["terms"].append(torch.where(centred.value.isfinite(), centred.error, 0.0))
    return bounds


def _stored_error(problem: Problem, moved: Rounded, indices: list[int], numels: list[int]) -> Tensor:
    """The bound of new parameters. Stochastic rounding gives either neighbour: one ulp of bfloat16, for the rows it concerns."""
    if not is_rounded_stochastically(problem.kwargs):
        return moved.error
    chosen = torch.tensor([getattr(problem.lists["params"][i], "dtype", None) is torch.bfloat16 for i in indices])
    reach = moved.value.abs() + moved.error.nan_to_num(posinf=0.0)
    return moved.error + torch.where(_spread(chosen, numels), ulp(reach, torch.bfloat16), 0.0)


def _random_numbers(problem: Problem, arithmetic: Arithmetic) -> Any:
    """z of every row: signs are exact, normals are off by up to 1e-6 (csrc/common/random.h: the radius by 3.6e-7, cosine and sine by 7e-8
    where the radius is at most 5.77, their product by half an ulp, 2.4e-7)."""
    distribution = problem.kwargs["distribution"]
    rows: Any = list(zip(problem.lists["params"], problem.lists["old_params"], strict=True))  # none of them is None
    z = torch.cat([z.reshape(-1) for z in random.random_numbers(rows, problem.kwargs["seed"], distribution)])
    return Rounded(z, torch.full_like(z, 1e-6 if distribution == "normal" else 0.0), arithmetic)


def _row(problem: Problem, index: int) -> list[Tensor | None]:
    """The tensors that decide a row's arithmetic."""
    if problem.op in ("grad_dots", "combine_"):
        return [tensors[index] for tensors in problem.lists.values()]
    names = ["params", "grads", "old_params", "exp_avgs", "exp_avg_sqs", "ema"]
    if problem.op in ("centralize_", "direction_norm_") and not problem.kwargs.get("adaptive", False):
        names.remove("params")
    if problem.kwargs.get("momentum", 0.0):
        names.append("momentum_buffers")
    return [problem.lists[name][index] for name in names if name in problem.lists]


def _numel(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()


def _spread(values: Tensor, numels: list[int]) -> Tensor:  # (rows,) -> (elements,)
    return values.repeat_interleave(torch.tensor(numels))
