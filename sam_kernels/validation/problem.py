"""One call of an operation: its arguments as data, and the call itself, of any module with the public names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sam_kernels import functional
from sam_kernels.validation.cases import copy_of
from sam_kernels.validation.options import OPTIONS

__all__ = ["NORMS", "SAVES", "Problem", "TensorLists", "run"]

TensorLists = dict[str, list[Tensor | None]]

NORMS = ("grad_norm", "grad_norms", "centralize_", "direction_norm_", "combine_")  # operations over lists that return norms
SAVES = ("perturb_", "random_perturb_")  # write old_params


@dataclass
class Problem:
    """The arguments of one call. An operation that takes single tensors has lists of one entry."""

    op: str
    lists: TensorLists  # by the names of the operation's arguments; "grads0", ... are the groups of ``grad_norms``
    kwargs: dict[str, Any]

    def tensor(self, name: str) -> Tensor:
        """Return the only entry of a list."""
        (tensor,) = self.lists[name]
        assert tensor is not None
        return tensor

    def clone(self, device: str = "cpu") -> Problem:
        """Return the same bits in memory of its own on a device, laid out alike: guards stay guards, shared memory stays shared."""
        copies: dict[int, Tensor] = {}
        tensors = {id(t): copy_of(t, device, copies) for tensors in self.lists.values() for t in tensors if t is not None}
        lists = {name: [None if t is None else tensors[id(t)] for t in given] for name, given in self.lists.items()}
        kwargs = {name: value.to(device, copy=True) if isinstance(value, Tensor) else value for name, value in self.kwargs.items()}
        return Problem(self.op, lists, kwargs)

    def double(self) -> Problem:
        """Return a copy with all floating-point tensors in float64. One tensor in two lists stays one."""

        def widened(tensor: Tensor) -> Tensor:
            return tensor.to(torch.float64).clone() if tensor.is_floating_point() else tensor.clone()

        wide = {id(t): widened(t) for tensors in self.lists.values() for t in tensors if t is not None}
        lists = {name: [None if t is None else wide[id(t)] for t in tensors] for name, tensors in self.lists.items()}
        return Problem(self.op, lists, {name: widened(v) if isinstance(v, Tensor) else v for name, v in self.kwargs.items()})


def run(problem: Problem, package: Any = functional) -> Any:
    """Call the operation of ``functional`` or ``reference``. The lists are changed in place."""
    if problem.op not in OPTIONS:
        module = package if hasattr(package, problem.op) else package.per_sample
        return getattr(module, problem.op)(**{name: tensors[0] for name, tensors in problem.lists.items()}, **problem.kwargs)
    lists: dict[str, Any] = dict(problem.lists)
    if problem.op == "grad_norms":
        lists = {"grad_groups": [tensors for name, tensors in lists.items() if name.startswith("grads")], "params": lists["params"]}
    if problem.op in NORMS and not problem.kwargs.get("adaptive"):
        lists.pop("params", None)
    return getattr(package, problem.op)(**lists, **problem.kwargs)
