"""The operations over lists: a call built from a case, a dtype and a keyword set, and the bounds of what it writes and returns."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from sam_kernels import reference
from sam_kernels._backend import Backend
from sam_kernels._tensor_list import slice_sizes
from sam_kernels.validation.backends import dtypes_of
from sam_kernels.validation.bounds import accepted, bounds_of
from sam_kernels.validation.cases import CASES, DTYPES, LAYOUT_CASES, MIXED_NARROW, Row, make_tensor, rows_of, seed_of
from sam_kernels.validation.compare import Worst, failure
from sam_kernels.validation.family import Family
from sam_kernels.validation.options import ABOUT_OTHERS, ABOUT_SLICES, FOR_LAYOUT_CASES, OPTIONS, SCHEDULED, concerns
from sam_kernels.validation.problem import NORMS, SAVES, Problem, TensorLists
from sam_kernels.validation.roundings import Roundings, roundings_of
from sam_kernels.validation.tolerance import dots_bound, norm_bound

__all__ = ["Lists"]

STEPS = (0.0, 1.0, 9.0, 999.0)


class Lists(Family):
    options = OPTIONS

    def combinations(self, op: str, dtype: str) -> Iterator[tuple[str, str]]:
        for case in CASES:
            if case in ABOUT_OTHERS.get(op, ()) or (case in ABOUT_SLICES and op != "centralize_"):
                continue
            if dtype in ("mixed", MIXED_NARROW) and case == "chunk_edges" and (op.startswith("grad_") or op == "random_perturb_"):
                continue  # a dtype a row is covered by the others
            options = FOR_LAYOUT_CASES[op] if case in LAYOUT_CASES else tuple(OPTIONS[op])
            for option in options[:1] if case == "many_tiny" else options:
                if concerns(op, option, dtype):
                    yield case, option

    def dtypes_of(self, backend: str, device: str) -> Collection[str]:
        return dtypes_of(backend, device)

    def build(self, op: str, case: str, dtype: str, option: str, seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed_of(seed, op, case, dtype, option))
        keywords = dict(OPTIONS[op][option])
        rows = rows_of(case, dtype)
        if keywords.pop("masters", False):
            rows = [_with_master(row, is_uniform=DTYPES.get(dtype) is not None) for row in rows]
        return self.call(op, rows, keywords, generator)

    def call(self, op: str, rows: Sequence[Row], keywords: Mapping[str, Any], generator: Generator) -> Problem:
        """Return the call with these rows. ``keywords``: as a set of :data:`OPTIONS`, without "masters"."""
        spec = dict(keywords)
        first = spec.pop("first", None)
        asked_norm = spec.pop("norm", "true" if op == "perturb_" else None)
        lists = _lists(op, _savable(op, rows, spec), spec, generator)
        if first is not None:
            name = "momentum_buffers" if op == "sgd_step_" else "ema"
            lists[name] = [None if first == "all" or i % 2 else t for i, t in enumerate(lists[name])]
        spec |= {name: torch.tensor(spec[name]) for name in ("grad_scale", "found_inf") if name in spec}
        if (dtype_of_numbers := spec.pop("tensors", None)) is not None:
            kind = getattr(torch, dtype_of_numbers)
            spec |= {name: torch.tensor(spec[name], dtype=kind) for name in SCHEDULED if name in spec}
        problem = Problem(op, lists, spec)
        if asked_norm is not None:
            spec["norm"] = _true_norm(problem) if asked_norm == "true" else torch.tensor(float(asked_norm))
        return problem

    def results(self, problem: Problem) -> dict[str, torch.dtype]:
        if problem.op == "grad_dots":
            return {"result": torch.float64}
        return {"result": _norm_dtype(_summed(problem))} if problem.op in NORMS else {}

    def roundings(self, problem: Problem, backend: Backend) -> Roundings:
        lists: Any = problem.lists  # no gradient is None
        sizes = slice_sizes(lists["grads"]) if problem.op == "centralize_" else ()
        return roundings_of(backend, problem.op, _numels(next(iter(lists.values()))), sizes)

    def bounds(self, before: Problem, exact: Problem, roundings: Roundings) -> dict[str, list[Tensor]]:
        bounds = bounds_of(before, roundings.means)
        terms = bounds.pop("terms", [])
        for name, tensors in exact.lists.items():
            bounds.setdefault(name, [torch.zeros(numel, dtype=torch.float64) for numel in _numels(tensors)])
        if before.op in NORMS:  # the norm of the bounds of its terms bounds the norm, by the triangle inequality
            carried = torch.linalg.vector_norm(torch.cat(terms)) if terms else torch.zeros((), dtype=torch.float64)
            norm = exact.tensor("result")
            numel = sum(_numels(_summed(before)[0]))
            bounds["result"] = [(norm_bound(norm + carried, numel, roundings.terms) + carried).reshape(-1)]
        if before.op == "grad_dots":
            lists: Any = exact.lists  # none of these entries is None
            d = reference.combinations.differences(lists["rights"], lists.get("origins"))
            left, right, error = (_flat(tensors) for tensors in (lists["lefts"], d, terms))
            bounds["result"] = [dots_bound(left, right, error, roundings.terms)]
        return bounds

    def inspect(self, before: Problem, after: Problem, exact: Problem) -> Worst | None:
        """``found_inf`` is set where a number is not finite, and stays where it was set before."""
        if "result" not in after.lists or "found_inf" not in after.kwargs:
            return None
        result = after.tensor("result")
        expected = bool(before.kwargs["found_inf"]) or not bool(result.isfinite().all())
        if bool(after.kwargs["found_inf"]) == expected:
            return None
        return failure("found_inf", f"is {after.kwargs['found_inf'].item()} for a result of {result.tolist()}")


def _savable(op: str, rows: Sequence[Row], spec: Mapping[str, Any]) -> list[Row]:
    """Return the rows with dtypes of ``old_params`` that the call takes."""
    if op in SAVES and not spec.get("from_old", False):  # which refuse to save 16-bit parameters in wider tensors
        return [_with_dtypes(row, old_params=row.dtypes["params"]) if _overwrites_master(row) else row for row in rows]
    return list(rows)


def _with_master(row: Row, *, is_uniform: bool) -> Row:
    """The row with a float32 master and 16-bit parameters; its state is float32 where all was of one dtype."""
    param = row.dtypes["params"]
    narrow = {torch.float32: torch.bfloat16, torch.float64: torch.float16}.get(param, param)
    return _with_dtypes(row, params=narrow, old_params=torch.float32, **({"state": torch.float32} if is_uniform else {}))


def _overwrites_master(row: Row) -> bool:
    return row.dtypes["params"].itemsize == 2 and row.dtypes["old_params"].itemsize > 2


def _with_dtypes(row: Row, **dtypes: torch.dtype) -> Row:
    return replace(row, dtypes={**row.dtypes, **dtypes})


def _lists(op: str, rows: list[Row], spec: dict[str, Any], generator: Generator) -> TensorLists:
    """Return the lists of a call. Keys of ``spec`` that are no keywords of the operation are taken out of it."""

    def tensors(role: str, magnitude: str = "magnitude", **how: bool) -> list[Tensor | None]:
        return [_tensor(row, role, getattr(row, magnitude), generator, **how) for row in rows]

    def state(**how: bool) -> list[Tensor | None]:
        sizes = [row.magnitude if row.state_magnitude is None else row.state_magnitude for row in rows]
        return [_tensor(row, "state", size, generator, **how) for row, size in zip(rows, sizes, strict=True)]

    def params(role: str = "params", *, poison: bool = False) -> list[Tensor | None]:
        return tensors(role, "param_magnitude", poison=poison)

    if op == "grad_norms":
        return {**{f"grads{j}": tensors("grads") for j in range(3)}, "params": params()}
    if op in ("grad_norm", "centralize_"):
        return {"grads": tensors("grads"), "params": params()}
    if op == "direction_norm_":
        return {"grads": tensors("grads"), "ema": state(), "params": params()}
    if op in ("grad_dots", "combine_"):
        roles = {"lefts": ("grads", "magnitude"), "rights": ("state", "magnitude")}
        if spec.pop("origins", False):
            roles["origins"] = ("old_params", "param_magnitude")
        alias = spec.pop("alias", None)  # a tensor that is written is laid out as one
        lists = {name: tensors("params" if name == alias else role, magnitude) for name, (role, magnitude) in roles.items()}
        return lists if op == "grad_dots" else {"outs": params(poison=True) if alias is None else lists[alias], **lists}
    from_old = spec.get("from_old", False)
    old = spec.pop("old", op in (*SAVES, "restore_"))
    lists = {"params": params(poison=from_old or (old and op not in SAVES))}
    if op not in ("random_perturb_", "restore_"):
        lists["grads"] = tensors("grads")
    if op == "sgd_step_":
        lists["momentum_buffers"] = state()
    if op == "adamw_step_":
        lists["exp_avgs"] = state()
        lists["exp_avg_sqs"] = state(squared=True)
        lists["state_steps"] = [torch.tensor(STEPS[i % len(STEPS)]) for i in range(len(rows))]
    if old:
        lists["old_params"] = params("old_params", poison=op in SAVES and not from_old)
    if op == "perturb_" and "kind" in spec:
        lists["ema"] = state()
    return lists


def _tensor(row: Row, role: str, magnitude: float, generator: Generator, *, squared: bool = False, poison: bool = False) -> Tensor:
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


def _flat(tensors: Sequence[Tensor]) -> Tensor:  # (N,)
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(t.reshape(-1) for t in tensors)])


def _true_norm(problem: Problem) -> Tensor:
    """Return the norm as grad_norm returns it."""
    lists: Any = problem.double().lists  # none of these entries is None
    source = "old_params" if problem.kwargs.get("from_old", False) else "params"
    norms = reference.grad_norms([lists["grads"]], lists[source], **accepted(reference.grad_norms, problem.kwargs))
    return norms[0].to(_norm_dtype([problem.lists["grads"]]), copy=True)


def _summed(problem: Problem) -> list[list[Tensor | None]]:
    """The lists whose norms are returned."""
    return [tensors for name, tensors in problem.lists.items() if name.startswith("grads") or name == "outs"]


def _norm_dtype(lists: list[list[Tensor | None]]) -> torch.dtype:
    is_double = any(t is not None and t.dtype is torch.float64 for tensors in lists for t in tensors)
    return torch.float64 if is_double else torch.float32


def _numels(tensors: list[Tensor | None]) -> list[int]:
    return [0 if t is None else t.numel() for t in tensors]
