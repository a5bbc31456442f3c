"""One operation over lists on some backends against the float64 reference: build the inputs of a case, run both, compare.

On a device the inputs are those of the CPU, moved there; the reference stays on the CPU, and so does the comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sam_kernels import reference
from sam_kernels._tensor_list import slice_sizes
from sam_kernels.validation.backends import backend_of, using
from sam_kernels.validation.bounds import bounds_of
from sam_kernels.validation.cases import guards_intact
from sam_kernels.validation.compare import Worst, compare, failure
from sam_kernels.validation.problem import SAVES, Problem, build, run
from sam_kernels.validation.roundings import Roundings, roundings_of
from sam_kernels.validation.tolerance import dots_bound, norm_bound

__all__ = ["check"]

NORMS = ("grad_norm", "grad_norms", "centralize_", "direction_norm_", "combine_")  # operations that return norms


def check(op: str, backends: Sequence[str], dtype: str, case: str, option: str, seed: int = 0, device: str = "cpu") -> dict[str, Worst]:
    """Return, for each backend, the worst element of all that the operation could have written: inputs and surrounding memory included."""
    before = build(op, case, dtype, option, seed)
    exact = before.double()
    starts = before.double().lists
    if "old_params" in starts and op not in SAVES:
        starts["params"] = starts["old_params"]
    exact_result = run(exact, reference)
    bounds: dict[str, list[Tensor]] = {}
    found: dict[str, Worst] = {}
    for backend in backends:
        chosen = backend_of(backend, device)
        numels = _numels(next(iter(before.lists.values())))
        lists: Any = before.lists  # no gradient is None
        roundings = roundings_of(chosen, op, numels, slice_sizes(lists["grads"]) if op == "centralize_" else ())
        if not found or op == "centralize_":  # some backends sum its means in float32
            bounds = bounds_of(before, roundings.means)
            directions = bounds.pop("directions", [])
            for name, tensors in exact.lists.items():
                bounds.setdefault(name, [torch.zeros(numel, dtype=torch.float64) for numel in _numels(tensors)])
        there = before.clone(device)
        pointers = _pointers(there)
        with using(backend):
            result = run(there)
        moved = _moved(there, pointers)
        problem = there.clone()
        if not chosen.knows_skips or device != "cpu":
            _drop_untouched_buffers(problem, exact)
        worst = Worst()
        if op in NORMS:
            worst = _compare_norms(result.cpu(), exact_result, before, problem, directions, roundings)
        elif op == "grad_dots":
            worst = _compare_dots(result.cpu(), exact_result, before, problem, directions, roundings)
        for name, tensors in problem.lists.items():
            worst = max(worst, compare(name, tensors, exact.lists[name], bounds[name], starts[name]), key=Worst.badness)
        found[backend] = moved or _side_effects(problem) or worst
    return found


def _moved(problem: Problem, pointers: dict[tuple[str, int], int]) -> Worst | None:
    now = _pointers(problem)
    for (name, i), pointer in pointers.items():
        if now[name, i] != pointer:
            return failure(name, "the data pointer changed", i)
    return None


def _side_effects(problem: Problem) -> Worst | None:
    for name, tensors in problem.lists.items():
        for i, tensor in enumerate(tensors):
            if tensor is not None and not guards_intact(tensor):
                return failure(name, "memory outside the tensor was written", i)
    return None


def _pointers(problem: Problem) -> dict[tuple[str, int], int]:
    return {(name, i): t.data_ptr() for name, tensors in problem.lists.items() for i, t in enumerate(tensors) if t is not None}


def _drop_untouched_buffers(problem: Problem, exact: Problem) -> None:
    """A backend that does not wait for the flag leaves a momentum of zero after a skipped first step. The reference leaves None."""
    for i, expected in enumerate(exact.lists.get("momentum_buffers", ())):
        made = problem.lists["momentum_buffers"][i]
        if expected is None and made is not None and not made.any():
            problem.lists["momentum_buffers"][i] = None


def _compare_norms(
    result: Tensor, exact: Tensor, before: Problem, problem: Problem, directions: Sequence[Tensor], roundings: Roundings
) -> Worst:
    """``directions`` are the bounds of computed terms before they are squared: by the triangle inequality their norm bounds the norm."""
    groups = [tensors for name, tensors in problem.lists.items() if name.startswith("grads") or name == "outs"]
    is_double = any(t is not None and t.dtype is torch.float64 for group in groups for t in group)
    if result.dtype is not (torch.float64 if is_double else torch.float32):
        return failure("result", f"dtype {result.dtype}")
    if result.shape != exact.shape:
        return failure("result", f"shape {tuple(result.shape)}, expected {tuple(exact.shape)}")
    carried = torch.linalg.vector_norm(torch.cat(list(directions))) if directions else torch.zeros((), dtype=torch.float64)
    bound = norm_bound(exact + carried, sum(_numels(groups[0])), roundings.terms) + carried
    worst = compare("result", [result], [exact], [bound.reshape(-1)], [None])
    return _wrong_flag(before, problem, result) or worst


def _compare_dots(
    result: Tensor, exact: Tensor, before: Problem, problem: Problem, differences: Sequence[Tensor], roundings: Roundings
) -> Worst:
    """``differences`` are the bounds of d, none where the lists are empty."""
    if result.dtype is not torch.float64 or result.shape != (3,):
        return failure("result", f"{result.dtype} of shape {tuple(result.shape)}")
    lists: Any = before.double().lists  # none of these entries is None
    d = reference.combinations.differences(lists["rights"], lists.get("origins"))
    left, right, error = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (lists["lefts"], d, differences))
    bound = dots_bound(left, right, error, roundings.terms)
    return _wrong_flag(before, problem, result) or compare("result", [result], [exact], [bound], [None])


def _wrong_flag(before: Problem, problem: Problem, result: Tensor) -> Worst | None:
    """``found_inf`` is set where a number is not finite, and stays where it was set before."""
    if "found_inf" not in problem.kwargs:
        return None
    expected = bool(before.kwargs["found_inf"]) or not bool(result.isfinite().all())
    if bool(problem.kwargs["found_inf"]) == expected:
        return None
    return failure("found_inf", f"is {problem.kwargs['found_inf'].item()} for a result of {result.tolist()}")


def _numels(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.numel() for t in tensors]
