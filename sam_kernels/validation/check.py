"""One operation on some backends against the float64 reference: build the inputs of a case, run both, compare.

On a device the inputs are those of the CPU, moved there; the reference stays on the CPU, and so does the comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from sam_kernels import functional, reference
from sam_kernels.validation.backends import backend_of, using
from sam_kernels.validation.cases import guards_intact
from sam_kernels.validation.compare import Worst, compare, failure
from sam_kernels.validation.family import Family
from sam_kernels.validation.lists import Lists
from sam_kernels.validation.per_sample import PerSample
from sam_kernels.validation.problem import SAVES, Problem, TensorLists, run
from sam_kernels.validation.sharpness import Sharpness

__all__ = ["FAMILIES", "build", "check", "check_call", "combinations"]

FAMILIES: dict[str, Family] = {op: family for family in (Lists(), PerSample(), Sharpness()) for op in family.options}  # by operation


def build(op: str, case: str, dtype: str, option: str, seed: int = 0) -> Problem:
    """Return the call that a case, a dtype and a keyword set describe."""
    return FAMILIES[op].build(op, case, dtype, option, seed)


def combinations(op: str, dtype: str) -> Iterable[tuple[str, str]]:
    """Return the (case, keyword set) pairs to check an operation with in a dtype."""
    return FAMILIES[op].combinations(op, dtype)


def check(op: str, backends: Sequence[str], dtype: str, case: str, option: str, seed: int = 0, device: str = "cpu") -> dict[str, Worst]:
    """Return, for each backend, the worst element of all that the operation could have written: inputs and surrounding memory included."""
    return check_call(build(op, case, dtype, option, seed), backends, device)


def check_call(before: Problem, backends: Sequence[str], device: str = "cpu") -> dict[str, Worst]:
    """As :func:`check`, of a call that is already built."""
    op = before.op
    family = FAMILIES[op]
    exact = before.double()
    starts = before.double().lists
    if "old_params" in starts and op not in SAVES:
        starts["params"] = starts["old_params"]
    exact.lists = _results(exact, family, reference) | exact.lists
    bounds_of = cache(partial(family.bounds, before, exact))  # most backends have the same roundings
    found: dict[str, Worst] = {}
    for backend in backends:
        chosen = backend_of(backend, device)
        there = before.clone(device)
        pointers = _pointers(there)
        with using(backend):
            results = _results(there, family, functional)
        moved = _moved(there, pointers)
        there.lists = results | there.lists
        after = there.clone()
        if not chosen.knows_skips or device != "cpu":
            _drop_untouched_buffers(after, exact)
        bounds = bounds_of(family.roundings(before, chosen))
        found[backend] = (
            moved
            or _side_effects(before, after, bounds)
            or _wrong_types(family.results(before), after, exact)
            or family.inspect(before, after, exact)
            or _worst(family, after, exact, bounds, starts)
        )
    return found


def _results(problem: Problem, family: Family, package: object) -> TensorLists:
    """Make the call. Return the tensors that it returned, by name."""
    result = run(problem, package)
    names = family.results(problem)
    return {name: [tensor] for name, tensor in zip(names, result if len(names) > 1 else [result], strict=False)}


def _pointers(problem: Problem) -> dict[tuple[str, int], int]:
    return {(name, i): t.data_ptr() for name, tensors in problem.lists.items() for i, t in enumerate(tensors) if t is not None}


def _moved(problem: Problem, pointers: dict[tuple[str, int], int]) -> Worst | None:
    now = _pointers(problem)
    for (name, i), pointer in pointers.items():
        if now[name, i] != pointer:
            return failure(name, "the data pointer changed", i)
    return None


def _drop_untouched_buffers(problem: Problem, exact: Problem) -> None:
    """A backend that does not wait for the flag leaves a momentum of zero after a skipped first step. The reference leaves None."""
    for i, expected in enumerate(exact.lists.get("momentum_buffers", ())):
        made = problem.lists["momentum_buffers"][i]
        if expected is None and made is not None and not made.any():
            problem.lists["momentum_buffers"][i] = None


def _side_effects(before: Problem, after: Problem, bounds: Mapping[str, list[Tensor]]) -> Worst | None:
    for name, starts in before.lists.items():
        for i, (start, tensor) in enumerate(zip(starts, after.lists[name], strict=True)):
            if tensor is not None and not guards_intact(tensor):
                return failure(name, "memory outside the tensor was written", i)
            if name not in bounds and not _is_unchanged(start, tensor):
                return failure(name, "an input was written", i)
    return None


def _is_unchanged(start: Tensor | None, tensor: Tensor | None) -> bool:
    if start is None or tensor is None:
        return start is tensor
    return torch.equal(start.nan_to_num(), tensor.nan_to_num())


def _wrong_types(dtypes: Mapping[str, torch.dtype], after: Problem, exact: Problem) -> Worst | None:
    for name, dtype in dtypes.items():
        result, expected = after.tensor(name), exact.tensor(name)
        if result.dtype is not dtype or result.shape != expected.shape:
            return failure(name, f"{result.dtype} of shape {tuple(result.shape)}, expected {dtype} of shape {tuple(expected.shape)}")
    return None


def _worst(family: Family, after: Problem, exact: Problem, bounds: Mapping[str, list[Tensor]], starts: TensorLists) -> Worst:
    worst = Worst()
    for name in after.lists:
        if name in bounds:
            actual = family.in_arithmetic(after, name)
            found = compare(name, actual, exact.lists[name], bounds[name], starts.get(name, [None] * len(actual)))
            worst = max(worst, found, key=Worst.badness)
    return worst
