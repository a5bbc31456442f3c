"""One operation on one backend against the float64 reference: builds the inputs a case and an option describe, runs both, compares.

On a device the inputs are those of the CPU, moved there; the reference stays on the CPU, and so does the comparison.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sam_kernels import _dispatch, functional, reference
from sam_kernels._dispatch import use_backend
from sam_kernels._tensor_list import slice_sizes
from sam_kernels.validation.bounds import bounds_of
from sam_kernels.validation.cases import CASES, LAYOUT_CASES, MIXED_NARROW, Row, dtypes_for, guards_intact, make_tensor, rows_of
from sam_kernels.validation.compare import Worst, compare
from sam_kernels.validation.options import FOR_LAYOUT_CASES, OPTIONS, SCHEDULED
from sam_kernels.validation.problem import Problem
from sam_kernels.validation.tolerance import dots_bound, norm_bound

__all__ = [
    "ABOUT_OTHERS",
    "ABOUT_SLICES",
    "AUTOMATIC",
    "Problem",
    "build",
    "check",
    "combinations",
    "concerns",
    "dtypes_of",
    "run",
    "seed_of",
]

AUTOMATIC = "automatic"  # no backend is forced: rows go where there are kernels for their dtypes

NORMS = {  # operations that return norms: what the backend's norm_roundings call their sums
    "grad_norm": "norm",
    "grad_norms": "norm",
    "centralize_": "norm",
    "direction_norm_": "direction",
    "combine_": "combine",
}
SAVES = ("perturb_", "random_perturb_")  # write old_params
ABOUT_OTHERS = {  # cases about gradients that an operation does not read
    "random_perturb_": ("zero_grads", "huge", "nan", "inf", "expanded_grads"),
    "restore_": ("huge_params", "tiny", "zero_grads", "nan", "inf", "expanded_grads"),
    "centralize_": ("expanded_grads",),  # which it refuses to write
}
ABOUT_SLICES = ("slices", "unaligned_slices", "long_slices")  # cases that say nothing new of other operations
STEPS = (0.0, 1.0, 9.0, 999.0)


def _module_of(backend: str, device: str) -> ModuleType:
    """The backend itself; the preferred one where none is forced."""
    with use_backend(None if backend == AUTOMATIC else backend):
        return _dispatch.select(torch.device(device).type)


def dtypes_of(backend: str, device: str = "cpu") -> list[str]:
    """The dtypes to check a backend with. What is chosen automatically is of interest where it depends on the row."""
    return ["mixed"] if backend == AUTOMATIC else dtypes_for(_module_of(backend, device).DTYPES)


def seed_of(*names: object) -> int:
    """The same number for the same names in every process."""
    return zlib.crc32("/".join(map(str, names)).encode())


def concerns(op: str, option: str, dtype: str) -> bool:
    """Whether a keyword set says something about a dtype: stochastic rounding is for bfloat16 parameters, and refuses float16 ones."""
    return dtype == "bfloat16" or "rounding_seed" not in OPTIONS[op][option]


def combinations(op: str, dtype: str) -> Iterator[tuple[str, str]]:
    """(case, option) pairs that say something about an operation in a dtype."""
    for case in CASES:
        if case in ABOUT_OTHERS.get(op, ()) or (case in ABOUT_SLICES and op != "centralize_"):
            continue
        if dtype in ("mixed", MIXED_NARROW) and case == "chunk_edges" and (op.startswith("grad_") or op == "random_perturb_"):
            continue  # a dtype a row is covered by the others
        options = FOR_LAYOUT_CASES[op] if case in LAYOUT_CASES else tuple(OPTIONS[op])
        for option in options[:1] if case == "many_tiny" else options:
            if concerns(op, option, dtype):
                yield case, option


def build(op: str, case: str, dtype: str, option: str, seed: int = 0) -> Problem:
    """The call that a case, a dtype and an option describe. What is only written holds NaN."""
    generator = torch.Generator().manual_seed(seed_of(seed, op, case, dtype, option))
    spec = dict(OPTIONS[op][option])
    rows = rows_of(case, dtype)
    old = spec.pop("old", op in ("perturb_", "random_perturb_", "restore_"))
    first = spec.pop("first", None)
    asked_norm = spec.pop("norm", "true" if op == "perturb_" else None)

    def tensors(role: str, magnitude: str = "param_magnitude", *, squared: bool = False, poison: bool = False) -> list[Tensor | None]:
        return [_tensor(row, role, getattr(row, magnitude), generator, squared=squared, poison=poison) for row in rows]

    lists: dict[str, list[Tensor | None]] = {}
    from_old = spec.get("from_old", False)
    if op in ("grad_norm", "grad_norms"):
        groups = 1 if op == "grad_norm" else 3
        for j in range(groups):
            lists[f"grads{j}"] = tensors("grads", "magnitude")
        lists["params"] = tensors("params")
    elif op == "centralize_":
        lists = {"grads": tensors("grads", "magnitude"), "params": tensors("params")}
    elif op in ("grad_dots", "combine_"):
        roles = {"lefts": ("grads", "magnitude"), "rights": ("state", "magnitude")}
        if spec.pop("origins", False):
            roles["origins"] = ("old_params", "param_magnitude")
        alias = spec.pop("alias", None)  # a tensor that is written is laid out as one
        lists = {name: tensors("params" if name == alias else role, magnitude) for name, (role, magnitude) in roles.items()}
        if op == "combine_":
            lists = {"outs": tensors("params", poison=True) if alias is None else lists[alias], **lists}
    elif op == "direction_norm_":
        lists = {"grads": tensors("grads", "magnitude"), "ema": tensors("state", "magnitude"), "params": tensors("params")}
    else:
        lists["params"] = tensors("params", poison=from_old or (old and op not in SAVES))
        if op not in ("random_perturb_", "restore_"):
            lists["grads"] = tensors("grads", "magnitude")
        if op == "sgd_step_":
            lists["momentum_buffers"] = tensors("state", "magnitude")
        if op == "adamw_step_":
            lists["exp_avgs"] = tensors("state", "magnitude")
            lists["exp_avg_sqs"] = tensors("state", "magnitude", squared=True)
            lists["state_steps"] = [torch.tensor(STEPS[i % len(STEPS)]) for i in range(len(rows))]
        if old:
            lists["old_params"] = tensors("old_params", poison=op in SAVES and not from_old)
        if op == "perturb_" and "kind" in spec:
            lists["ema"] = tensors("state", "magnitude")
    if first is not None:
        name = "momentum_buffers" if op == "sgd_step_" else "ema"
        lists[name] = [None if first == "all" or i % 2 else t for i, t in enumerate(lists[name])]
    for name in ("grad_scale", "found_inf"):
        if name in spec:
            spec[name] = torch.tensor(spec[name])
    if (dtype_of_numbers := spec.pop("tensors", None)) is not None:
        numbers = {name: spec[name] for name in SCHEDULED if name in spec}
        spec |= {name: torch.tensor(value, dtype=getattr(torch, dtype_of_numbers)) for name, value in numbers.items()}
    problem = Problem(op, lists, spec)
    if asked_norm is not None:
        spec["norm"] = torch.tensor(math.nan if asked_norm == "nan" else math.inf) if asked_norm != "true" else _true_norm(problem)
    return problem


def _tensor(row: Row, role: str, magnitude: float, generator: torch.Generator, *, squared: bool, poison: bool) -> Tensor:
    values = torch.randn(row.shape, generator=generator, dtype=torch.float64)
    if poison:
        values = torch.full_like(values, math.nan)
    elif squared:
        values = (values * magnitude).square()
    else:
        values = values * magnitude
    if role == "grads" and row.special is not None and not poison:
        values.view(-1)[::3] = row.special
    dtype = row.dtypes[role]
    limit = torch.finfo(dtype).max
    return make_tensor(values if row.special is not None or poison else values.clamp(-limit, limit), dtype, row.layout(role))


def _true_norm(problem: Problem) -> Tensor:
    """The norm as grad_norm gives it."""
    lists: Any = problem.double().lists  # none of these entries is None
    adaptive = problem.kwargs.get("adaptive", False)
    source = "old_params" if problem.kwargs.get("from_old", False) else "params"
    norm = reference.grad_norm(lists["grads"], lists[source], adaptive=adaptive, eta=problem.kwargs.get("eta", 0.0))
    return norm.to(torch.float64 if any(g is not None and g.dtype is torch.float64 for g in problem.lists["grads"]) else torch.float32)


def run(problem: Problem, module: Any = functional) -> Any:
    """Calls the operation of a module with the public names. The lists are changed in place."""
    op, lists, kwargs = getattr(module, problem.op), problem.lists, dict(problem.kwargs)
    if problem.op in ("grad_norm", "grad_norms"):
        grads = [tensors for name, tensors in lists.items() if name.startswith("grads")]
        params = lists["params"] if kwargs.get("adaptive") else None
        return op(grads[0] if problem.op == "grad_norm" else grads, params, **kwargs)
    if problem.op == "centralize_":
        return op(lists["grads"], lists["params"] if kwargs.get("adaptive") else None, **kwargs)
    if problem.op in ("grad_dots", "combine_"):
        return op(*lists.values(), **kwargs)
    if problem.op == "direction_norm_":
        return op(lists["grads"], lists["ema"], lists["params"] if kwargs.get("adaptive") else None, **kwargs)
    if problem.op == "perturb_":
        return op(lists["params"], lists["grads"], lists["old_params"], kwargs.pop("norm"), ema=lists.get("ema"), **kwargs)
    if problem.op in ("random_perturb_", "restore_"):
        return op(lists["params"], lists["old_params"], **kwargs)
    positional = [tensors for name, tensors in lists.items() if name != "old_params"]
    return op(*positional, old_params=lists.get("old_params"), **kwargs)


def check(op: str, backends: Sequence[str], dtype: str, case: str, option: str, seed: int = 0, device: str = "cpu") -> dict[str, Worst]:
    """For each backend the worst element of everything the operation could have written, inputs and surrounding memory included."""
    before = build(op, case, dtype, option, seed)
    exact = before.double()
    starts = before.double().lists
    if "old_params" in starts and op not in SAVES:
        starts["params"] = starts["old_params"]
    exact_result = run(exact, reference)
    bounds: dict[str, list[Tensor]] = {}
    found: dict[str, Worst] = {}
    for backend in backends:
        module = _module_of(backend, device)
        if not found or op == "centralize_":  # whose means some backends sum in float32
            bounds = bounds_of(before, _roundings(before, module)[0])
            directions = bounds.pop("directions", [])
            for name, tensors in exact.lists.items():
                bounds.setdefault(name, [torch.zeros(0 if t is None else t.numel(), dtype=torch.float64) for t in tensors])
        there = before.clone(device)
        pointers = _pointers(there)
        with use_backend(None if backend == AUTOMATIC else backend):
            result = run(there)
        moved = _moved(there, pointers)
        problem = there.clone()
        if not module.KNOWS_SKIPS or device != "cpu":
            _drop_untouched_buffers(problem, exact)
        worst = Worst()
        if op in NORMS:
            worst = _compare_norms(result.cpu(), exact_result, before, problem, directions, module)
        elif op == "grad_dots":
            worst = _compare_dots(result.cpu(), exact_result, before, problem, directions, module)
        for name, tensors in problem.lists.items():
            worst = max(worst, compare(name, tensors, exact.lists[name], bounds[name], starts[name]), key=Worst.badness)
        found[backend] = moved or _side_effects(problem) or worst
    return found


def _moved(problem: Problem, pointers: dict[tuple[str, int], int]) -> Worst | None:
    now = _pointers(problem)
    for (name, i), pointer in pointers.items():
        if now[name, i] != pointer:
            return Worst(name, i, passed=False, reason="the data pointer changed")
    return None


def _side_effects(problem: Problem) -> Worst | None:
    for name, tensors in problem.lists.items():
        for i, tensor in enumerate(tensors):
            if tensor is not None and not guards_intact(tensor):
                return Worst(name, i, passed=False, reason="memory outside the tensor was written")
    return None


def _pointers(problem: Problem) -> dict[tuple[str, int], int]:
    return {(name, i): t.data_ptr() for name, tensors in problem.lists.items() for i, t in enumerate(tensors) if t is not None}


def _drop_untouched_buffers(problem: Problem, exact: Problem) -> None:
    """A first step that the backend could not know to be skipped leaves a momentum of zero where the reference leaves nothing."""
    for i, expected in enumerate(exact.lists.get("momentum_buffers", ())):
        made = problem.lists["momentum_buffers"][i]
        if expected is None and made is not None and not made.any():
            problem.lists["momentum_buffers"][i] = None


def _compare_norms(
    result: Tensor, exact: Tensor, before: Problem, problem: Problem, directions: Sequence[Tensor], backend: ModuleType
) -> Worst:
    """``directions`` are the bounds of what was squared, where that is computed: by the triangle inequality their norm is the norm's."""
    groups = [tensors for name, tensors in problem.lists.items() if name.startswith("grads") or name == "outs"]
    is_double = any(t is not None and t.dtype is torch.float64 for group in groups for t in group)
    if result.dtype is not (torch.float64 if is_double else torch.float32):
        return Worst("result", passed=False, reason=f"dtype {result.dtype}")
    if result.shape != exact.shape:
        return Worst("result", passed=False, reason=f"shape {tuple(result.shape)}, expected {tuple(exact.shape)}")
    carried = torch.linalg.vector_norm(torch.cat(list(directions))) if directions else torch.zeros((), dtype=torch.float64)
    bound = norm_bound(exact + carried, sum(_numels(groups[0])), _roundings(problem, backend)[1]) + carried
    worst = compare("result", [result], [exact], [bound.reshape(-1)], [None])
    return _wrong_flag(before, problem, result) or worst


def _roundings(problem: Problem, backend: ModuleType) -> tuple[list[int] | None, int | None]:
    """float32 additions that an element passes through in each tensor's means, and a term in the norm. None: sums are in float64."""
    if problem.op not in NORMS:
        return None, None
    squared: Any = next(
        tensors for name, tensors in problem.lists.items() if name.startswith("grads") or name == "outs"
    )  # none of them None
    if problem.op == "centralize_":
        means, terms = backend.centralize_roundings(_numels(squared), slice_sizes(squared))
        return means, terms
    return None, backend.norm_roundings(_numels(squared), NORMS[problem.op])


def _compare_dots(
    result: Tensor, exact: Tensor, before: Problem, problem: Problem, differences: Sequence[Tensor], backend: ModuleType
) -> Worst:
    """``differences`` are the bounds of d, none where the lists are empty."""
    if result.dtype is not torch.float64 or result.shape != (3,):
        return Worst("result", passed=False, reason=f"{result.dtype} of shape {tuple(result.shape)}")
    lists: Any = before.double().lists  # none of these entries is None
    d = reference.combinations.differences(lists["rights"], lists.get("origins"))
    left, right, error = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (lists["lefts"], d, differences))
    bound = dots_bound(left, right, error, backend.norm_roundings(_numels(lists["lefts"]), "dots"))
    return _wrong_flag(before, problem, result) or compare("result", [result], [exact], [bound], [None])


def _wrong_flag(before: Problem, problem: Problem, result: Tensor) -> Worst | None:
    """``found_inf`` is set where a number is not finite, and stays where it was set before."""
    if "found_inf" not in problem.kwargs:
        return None
    expected = bool(before.kwargs["found_inf"]) or not bool(result.isfinite().all())
    if bool(problem.kwargs["found_inf"]) == expected:
        return None
    return Worst("found_inf", passed=False, reason=f"is {problem.kwargs['found_inf'].item()} for a result of {result.tolist()}")


def _numels(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.numel() for t in tensors]
