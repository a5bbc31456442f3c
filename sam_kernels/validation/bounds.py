"""Bounds of the results of one call: the reference formulas evaluated on :class:`Rounded`, for all rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sam_kernels._tensor_list import slice_sizes
from sam_kernels.reference import combinations, directions, ops, random
from sam_kernels.validation.options import SCHEDULED
from sam_kernels.validation.problem import Problem
from sam_kernels.validation.tolerance import Arithmetic, Rounded, mean_bound, ulp

__all__ = ["bounds_of"]


def bounds_of(problem: Problem, roundings: Sequence[int] | None = None) -> dict[str, list[Tensor]]:
    """Return a bound (numel,) for each tensor of each list that a call, not yet made, will compute. A list without bounds must be exact.

    ``roundings``: of each tensor's means, on a backend that sums them in float32 (:func:`roundings_of`).
    """
    if problem.op == "centralize_":
        return _centralized_bounds(problem, roundings)
    skipped = ops.is_skipped(problem.kwargs.get("norm"), problem.kwargs.get("found_inf"))
    if problem.op in ("grad_norm", "grad_norms", "restore_") or (skipped and problem.op != "combine_"):
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
    """Bounds of the rows' elements, one after the other."""
    kwargs: dict[str, Any] = {name: float(value) if name in SCHEDULED else value for name, value in problem.kwargs.items()}
    numels = [_numel(_first(problem)[i]) for i in indices]
    is_double = [any(t is not None and t.dtype is torch.float64 for t in _row(problem, i)) for i in indices]
    arithmetic = Arithmetic.of(_spread(torch.tensor(is_double), numels))

    def operand(name: str) -> Any:
        tensors = [problem.lists[name][i] for i in indices]
        flat = [t.reshape(-1).to(torch.float64) for t in tensors if t is not None]
        return Rounded.exact(torch.cat(flat), arithmetic) if flat else None

    norm = kwargs.pop("norm", None)
    if norm is not None:  # rounded once into the arithmetic
        value = norm.to(torch.float64)
        norm = Rounded(value, value.abs() * arithmetic.unit / 2, arithmetic)
    kwargs.pop("found_inf", None)
    if problem.op in ("grad_dots", "combine_"):
        origin = operand("origins") if "origins" in problem.lists else None
        if problem.op == "grad_dots":
            return {"directions": torch.zeros_like(operand("rights").value) if origin is None else (operand("rights") - origin).error}
        sum_of_three: Any = combinations.combined(operand("lefts"), operand("rights"), origin, **kwargs)
        return {"outs": sum_of_three.error, "directions": sum_of_three.error}
    if problem.op == "direction_norm_":
        return _direction_bounds(operand, kwargs)
    reads_old = kwargs.pop("from_old", problem.op in ("sgd_step_", "adamw_step_") and "old_params" in problem.lists)
    param = operand("old_params" if reads_old else "params")
    if problem.op == "random_perturb_":
        perturbed: Any = random.randomly_perturbed(param, _random_numbers(problem, arithmetic), kwargs["scale"])
        return {"params": perturbed.error}
    grad = operand("grads")
    if problem.op == "perturb_":
        rounding_seed, chosen = (
            kwargs.pop("rounding_seed", None),
            {name: kwargs.pop(name) for name in ("kind", "sigma", "lmbda") if name in kwargs},
        )
        if "ema" in problem.lists:
            scale = kwargs.pop("grad_scale", None)
            grad = directions.direction_used(grad if scale is None else grad / scale, operand("ema"), **chosen)
        moved: Any = ops.perturbed(param, grad, norm, **kwargs)
        return {"params": moved.error + (0.0 if rounding_seed is None else _rounding_step(problem, moved, indices, numels))}
    names = ("maximize", "grad_scale", "max_norm")
    grad = ops.descent_gradient(grad, norm=norm, **{name: kwargs.pop(name) for name in names if name in kwargs})
    if problem.op == "sgd_step_":
        buffer = operand("momentum_buffers") if kwargs.get("momentum", 0.0) else None
        updated: Any = ops.sgd_updated(param, grad, buffer, **kwargs)
        bounds = {"params": updated[0].error}
        return bounds if updated[1] is None else {**bounds, "momentum_buffers": updated[1].error}
    steps = torch.stack([t.to(torch.float64) for t in (problem.lists["state_steps"][i] for i in indices) if t is not None])
    updated = ops.adamw_updated(param, grad, operand("exp_avgs"), operand("exp_avg_sqs"), _spread(steps, numels) + 1, **kwargs)
    return dict(zip(("params", "exp_avgs", "exp_avg_sqs"), (rounded.error for rounded in updated), strict=True))


def _direction_bounds(operand: Any, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Of the new averages, and of the terms whose squares are summed."""
    chosen = {name: kwargs[name] for name in ("kind", "theta", "sigma", "lmbda") if name in kwargs}
    grad = operand("grads")
    grad = grad / kwargs["grad_scale"] if "grad_scale" in kwargs else grad
    updated: Any = directions.direction_updated(grad, operand("ema"), **chosen)  # of Rounded: formulas take whatever has the operators
    direction, average = updated
    if kwargs.get("adaptive", False):
        direction = (abs(operand("params")) + kwargs.get("eta", 0.0)) * direction
    return {"ema": torch.where(grad.value.isfinite(), average.error, 0.0), "directions": direction.error}


def _centralized_bounds(problem: Problem, roundings: Sequence[int] | None) -> dict[str, list[Tensor]]:
    """Of the centralised gradients, and of the terms whose squares are summed."""
    bounds: dict[str, list[Tensor]] = {"grads": [], "directions": []}
    lists: Any = problem.lists  # none of these entries is None
    for i, (grad, size) in enumerate(zip(lists["grads"], slice_sizes(lists["grads"]), strict=True)):
        flat = grad.reshape(-1).to(torch.float64)
        is_double = torch.full_like(flat, any(t is not None and t.dtype is torch.float64 for t in _row(problem, i)), dtype=torch.bool)
        centred: Any = Rounded.exact(flat, Arithmetic.of(is_double))
        if size > 0:
            centred = centred - mean_bound(centred, size, None if roundings is None else roundings[i])
        bounds["grads"].append(centred.error)
        if problem.kwargs.get("adaptive", False):
            param = Rounded.exact(lists["params"][i].reshape(-1).to(torch.float64), centred.arithmetic)
            centred = (abs(param) + problem.kwargs["eta"]) * centred
        bounds["directions"].append(torch.where(centred.value.isfinite(), centred.error, 0.0))
    return bounds


def _rounding_step(problem: Problem, moved: Rounded, indices: list[int], numels: list[int]) -> Tensor:
    """Stochastic rounding gives either neighbour: one ulp of bfloat16, for the rows it concerns."""
    chosen = torch.tensor([getattr(problem.lists["params"][i], "dtype", None) is torch.bfloat16 for i in indices])
    reach = moved.value.abs() + moved.error.nan_to_num(posinf=0.0)
    return torch.where(_spread(chosen, numels), ulp(reach, torch.bfloat16), 0.0)


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
