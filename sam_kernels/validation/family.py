"""What an operation's family provides for :mod:`sam_kernels.validation.check`."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from sam_kernels._backend import Backend
from sam_kernels.validation.compare import Worst
from sam_kernels.validation.problem import Problem
from sam_kernels.validation.roundings import Roundings

__all__ = ["Family"]

Options = dict[str, dict[str, dict[str, Any]]]  # operation -> keyword set -> keywords


class Family:
    """Operations that share their cases, their bounds and the backends that have them."""

    options: Options

    def cases(self, op: str) -> Iterable[str]:
        """Return the names of an operation's cases."""
        raise NotImplementedError

    def combinations(self, op: str, dtype: str) -> Iterable[tuple[str, str]]:
        """Return the (case, keyword set) pairs to check an operation with in a dtype."""
        return itertools.product(self.cases(op), self.options[op])

    def dtypes_of(self, backend: str, device: str) -> Collection[str]:
        """Return the names of the dtypes to check a backend with: none if it lacks the family."""
        raise NotImplementedError

    def build(self, op: str, case: str, dtype: str, option: str, seed: int = 0) -> Problem:
        """Return the described call. Tensors that are only written, and all memory around tensors, hold NaN."""
        raise NotImplementedError

    def results(self, problem: Problem) -> dict[str, torch.dtype]:
        """Return names and dtypes of the tensors that the operation returns."""
        return {}

    def roundings(self, problem: Problem, backend: Backend) -> Roundings:
        """Return the float32 roundings in the sums of a backend."""
        return Roundings()

    def bounds(self, before: Problem, exact: Problem, roundings: Roundings) -> dict[str, list[Tensor]]:
        """Return a bound (numel,) for each tensor of each list that is written, and of each result. A list without bounds is an input.

        ``exact``: the float64 call after it was made; its results are lists of one entry.
        """
        raise NotImplementedError

    def in_arithmetic(self, after: Problem, name: str) -> list[Tensor | None]:
        """Return the tensors of a list in the dtype whose ulp is the unit of their errors."""
        return after.lists[name]

    def inspect(self, before: Problem, after: Problem, exact: Problem) -> Worst | None:
        """Return a failure that no bound describes."""
        return None
