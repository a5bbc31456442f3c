"""One call of an operation over lists: its arguments as data, built from a case, a dtype and a keyword set, and run on any module."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sam_kernels import functional, reference
from sam_kernels.validation.cases import Row, copy_of, make_tensor, rows_of, seed_of
from sam_kernels.validation.options import OPTIONS, SCHEDULED

__all__ = ["SAVES", "Problem", "build", "run"]

SAVES = ("perturb_", "random_perturb_")  # write old_params
STEPS = (0.0, 1.0, 9.0, 999.0)


@dataclass
class Problem:
    """The arguments of one call: ``lists`` in the order of the operation's positional arguments, then keywords."""

    op: str
    lists: dict[str, list[Tensor | None]]
    kwargs: dict[str, Any]

    def clone(self, device: str = "cpu") -> Problem:
        """Return the same bits in memory of its own on a device, laid out alike: guards stay guards, shared memory stays shared."""
        copies: dict[int, Tensor] = {}
        tensors = {id(t): copy_of(t, device, copies) for tensors in self.lists.values() for t in tensors if t is not None}
        lists = {name: [None if t is None else tensors[id(t)] for t in given] for name, given in self.lists.items()}
        kwargs = {name: value.to(device, copy=True) if isinstance(value, Tensor) else value for name, value in self.kwargs.items()}
        return Problem(self.op, lists, kwargs)

    def double(self) -> Problem:
        """Return everything in float64, contiguous. One tensor in two lists stays one."""
        wide = {id(t): t.to(torch.float64).clone() for tensors in self.lists.values() for t in tensors if t is not None}
        lists = {name: [None if t is None else wide[id(t)] for t in tensors] for name, tensors in self.lists.items()}
        return Problem(self.op, lists, {k: v.to(torch.float64).clone() if isinstance(v, Tensor) else v for k, v in self.kwargs.items()})


def build(op: str, case: str, dtype: str, option: str, seed: int = 0) -> Problem:
    """Return the call that a case, a dtype and a keyword set describe. Tensors that are only written hold NaN."""
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
    """Return the norm as grad_norm returns it."""
    lists: Any = problem.double().lists  # none of these entries is None
    adaptive = problem.kwargs.get("adaptive", False)
    source = "old_params" if problem.kwargs.get("from_old", False) else "params"
    norm = reference.grad_norm(lists["grads"], lists[source], adaptive=adaptive, eta=problem.kwargs.get("eta", 0.0))
    return norm.to(torch.float64 if any(g is not None and g.dtype is torch.float64 for g in problem.lists["grads"]) else torch.float32)


def run(problem: Problem, module: Any = functional) -> Any:
    """Call the operation of a module with the public names. The lists are changed in place."""
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
