"""Two implementations on the same inputs: everything that a call writes must have the same bits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from sam_kernels import functional
from sam_kernels.validation.check import build
from sam_kernels.validation.problem import Problem, run
from tests.helpers.compare import assert_same_bits

__all__ = ["RANDOM", "Choose", "assert_same_perturbation", "compare_written"]

Choose = Callable[[], AbstractContextManager[object]]  # in it one of the implementations runs
RANDOM = ("rademacher", "normal", "rounding")


def compare_written(
    op: str,
    dtype: str,
    calls: Iterable[tuple[str, str]],
    ours: Choose,
    theirs: Choose,
    prepare: Callable[[Problem], Problem] = lambda problem: problem,
) -> int:
    """How many calls were compared. A call is a case and a keyword set."""
    compared = 0
    for case, option in calls:
        written = []
        for choose in (ours, theirs):
            problem = prepare(build(op, case, dtype, option))
            with choose():
                run(problem)
            written.append(problem.lists)
        for name, expected in written[1].items():
            assert_same_bits(f"case {case}, option {option}, {name}", written[0][name], expected)
        compared += 1
    return compared


def assert_same_perturbation(distribution: str, dtype: torch.dtype, sizes: Collection[int], ours: Choose, theirs: Choose) -> None:
    """By random numbers, across the borders of blocks and chunks; the third row begins askew."""
    start = [torch.randn(size).to(dtype) for size in sizes]
    start[2] = start[2][1:]
    grads = [torch.randn(tensor.shape).to(dtype) for tensor in start]
    found = []
    for choose in (ours, theirs):
        with choose():
            found.append(_perturbed(distribution, start, grads))
    assert_same_bits("params", *found)
    assert not torch.equal(found[0][0], start[0])


def _perturbed(distribution: str, start: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    params, olds = [tensor.clone() for tensor in start], [torch.full_like(tensor, torch.nan) for tensor in start]
    params[2] = torch.cat([torch.zeros(1, dtype=start[2].dtype), start[2]])[1:]
    if distribution == "rounding":
        functional.perturb_(params, grads, olds, torch.tensor(1.0), rho=0.01, lambd=0.0, rounding_seed=2**40 + 7)
    else:
        functional.random_perturb_(params, olds, seed=2**63 + 5, scale=0.01, distribution=distribution)
    assert_same_bits("old_params", olds, start)
    return params
