"""The CUDA kernels compiled for the host beside the CPU's: the same formulas in the same order, so the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import _dispatch, functional
from sam_kernels.backends.native import cpu, cuda
from sam_kernels.operations import AdamWStep, Combine, GradNorms, Operands, Operation, Perturb, RandomPerturb, SgdStep
from sam_kernels.validation.cases import DTYPES, MIXED_NARROW
from sam_kernels.validation.check import build
from sam_kernels.validation.problem import run
from sam_kernels.validation.roundings import roundings_of
from sam_kernels.validation.tolerance import norm_bound, ulp
from tests.helpers.backends import Calls, all_calls, calls_in_pairs, replace_backend
from tests.helpers.bits import RANDOM, assert_same_perturbation, compare_written
from tests.helpers.compare import assert_same_bits

ELEMENTWISE = ("combine_", "perturb_", "random_perturb_", "restore_", "sgd_step_", "adamw_step_")
ROWS = [3, 5, 64, 0, 1030]  # again and again, in lists of more rows than a launch takes
TYPES = tuple(DTYPES)
WITH_NARROW = (*TYPES, MIXED_NARROW)


def calls_of(op: str, dtypes: tuple[str, ...], is_full: bool, options_left_out: tuple[str, ...] = ()) -> Calls:
    """All calls of an operation; without --full those in which every pair of a dtype, a case and a keyword set occurs."""
    return (all_calls if is_full else calls_in_pairs)(op, dtypes, (), options_left_out)


@contextmanager
def cpu_kernels() -> Iterator[None]:
    """CPU tensors go to the CPU's kernels, as in a process of users."""
    with pytest.MonkeyPatch.context() as patch:
        replace_backend(patch, "native.cuda", cpu.BACKEND)
        yield


@contextmanager
def cuda_kernels() -> Iterator[None]:
    assert _dispatch.select("cpu") is cuda.BACKEND
    yield


def test_there_are_two() -> None:
    assert cuda._cuda.ON_HOST
    with cpu_kernels():
        assert _dispatch.select("cpu") is cpu.BACKEND
    with cuda_kernels():
        pass


@pytest.mark.parametrize("dtype", WITH_NARROW)
@pytest.mark.parametrize("op", ELEMENTWISE)
def test_same_bits_as_the_cpu_kernels(op: str, dtype: str, is_full: bool) -> None:
    """Scalars too: both make them in double. (A first step that is skipped leaves zeros in new buffers on a device, none on the CPU.)"""
    calls = calls_of(op, WITH_NARROW, is_full, ("found_inf_first",))[dtype]
    assert compare_written(op, dtype, calls, cuda_kernels, cpu_kernels) >= 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_directions_have_the_bits_of_the_cpu_kernels(dtype: str, is_full: bool) -> None:
    """The moving average; its norm is summed in another order."""
    calls = calls_of("direction_norm_", TYPES, is_full)[dtype]
    assert compare_written("direction_norm_", dtype, calls, cuda_kernels, cpu_kernels) >= 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("distribution", RANDOM)
def test_random_numbers_across_chunks(distribution: str, dtype: torch.dtype) -> None:
    if distribution == "rounding" and dtype is torch.float16:
        pytest.skip("stochastic rounding is for bfloat16, and refuses float16")
    assert_same_perturbation(distribution, dtype, (150_000, 65_536, 65_539, 1023), cuda_kernels, cpu_kernels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["grad_norm", "grad_norms", "direction_norm_", "combine_"])
def test_norms_agree_within_their_roundings(op: str, dtype: str, is_full: bool) -> None:
    """Sums of float64 on the CPU; here a term passes through as many float32 additions as the module says."""
    for case, option in calls_of(op, TYPES, is_full)[dtype]:
        (found, numels), (expected, _) = (norm_of(op, case, dtype, option, choose) for choose in (cuda_kernels, cpu_kernels))
        roundings = roundings_of(cuda.BACKEND, op, numels).terms
        bound = norm_bound(expected.double(), sum(numels), roundings) + ulp(expected, expected.dtype)  # both are rounded to it
        near = (found.double() - expected.double()).abs() <= bound
        same = found.eq(expected) | (found.isnan() & expected.isnan())
        assert (near | same).all(), f"{case}, {option}: {found}, expected {expected} within {bound}"


def norm_of(op: str, case: str, dtype: str, option: str, choose: Callable[[], Any]) -> tuple[Tensor, list[int]]:
    """The norm, or norms, and the sizes of the rows."""
    problem = build(op, case, dtype, option)
    with choose():
        result = run(problem)
    first = next(iter(problem.lists.values()))
    return result, [0 if tensor is None else tensor.numel() for tensor in first]


def gradients(count: int) -> list[Tensor]:
    return [torch.randn(size) for size, _ in zip(itertools.cycle(ROWS), range(count), strict=False)]


@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
def test_a_norm_does_not_depend_on_how_rows_are_split_into_launches(adaptive: bool) -> None:
    """A group of rows alone, in a small launch, and behind as many others that it lies across the border of two large ones."""
    capacity = cuda._cuda.LargeSplit.CAPACITY  # of a table for four operands; one for two holds more rows
    group, before = gradients(90), gradients(2 * capacity)
    kwargs = {"adaptive": adaptive, "eta": 0.01 if adaptive else 0.0}
    (alone,) = norms_of([group], **kwargs)
    for count in (1, capacity // 2, *range(capacity, 2 * capacity, capacity // 12)):
        assert_same_bits(f"behind {count} rows", [norms_of([before[:count], group], **kwargs)[1]], [alone])


@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
def test_slices_do_not_depend_on_how_rows_are_split_into_launches(adaptive: bool) -> None:
    """Rows of a list that takes several launches, beside the same rows in lists of a few."""
    shapes = [(3, 5), (64,), (1, 70_000), (40, 27), (7, 1), (2, 600)]
    grads = [torch.randn(shape) for shape, _ in zip(itertools.cycle(shapes), range(2 * cuda._cuda.LargeSplit.CAPACITY), strict=False)]
    whole, parts = [grad.clone() for grad in grads], [grad.clone() for grad in grads]
    params = [grad.cos() for grad in grads]
    functional.centralize_(whole, params, adaptive=adaptive)
    for i in range(0, len(parts), 11):
        functional.centralize_(parts[i : i + 11], params[i : i + 11], adaptive=adaptive)
    assert_same_bits("grads", whole, parts)


def norms_of(groups: list[list[Tensor]], **kwargs: Any) -> Tensor:
    """The norm of each group, in as many launches as all rows together need. A parameter is the cosine of its gradient."""
    rows = [row for group in groups for row in group]
    params = [row.cos() for row in rows]
    sizes = [len(group) for group in groups]
    lists = {"grads": rows, "params": params if kwargs.get("adaptive") else None}
    return cuda.grad_norms(GradNorms(group_sizes=sizes, **kwargs), Operands(lists, range(len(rows))))


def rows(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in (3, 70)]


def perturb(make: Callable[[float], Any]) -> list[Tensor]:
    params = rows(1)
    op = Perturb(norm=make(1.5), rho=make(0.125), lambd=make(0.375), grad_scale=make(4.0), found_inf=make(0.0))
    called(op, params=params, grads=rows(2), old_params=rows(3))
    return params


def combine(make: Callable[[float], Any]) -> list[Tensor]:
    outs = rows(1)
    weights = {"left_weight": make(0.625), "right_weight": make(-1.5), "origin_weight": make(0.375)}
    norm = called(Combine(found_inf=torch.tensor(0.0), **weights), outs=outs, lefts=outs, rights=rows(2), origins=rows(3))
    return [*outs, norm]


def random_perturb(make: Callable[[float], Any]) -> list[Tensor]:
    params = rows(1)
    called(RandomPerturb(seed=5, scale=make(0.625), distribution="normal"), params=params, old_params=rows(2))
    return params


def sgd(make: Callable[[float], Any]) -> list[Tensor]:
    params, buffers = rows(1), rows(2)
    scalars: dict[str, Any] = {"grad_scale": make(4.0), "found_inf": make(0.0), "norm": make(8.0), "max_norm": 0.5}
    op = SgdStep(lr=make(0.0625), momentum=0.9, dampening=0.1, weight_decay=0.1, **scalars)
    called(op, params=params, grads=rows(3), momentum_buffers=buffers)
    return params + buffers


def adamw(make: Callable[[float], Any]) -> list[Tensor]:
    params, firsts, seconds, steps = rows(1), rows(2), [row.square() for row in rows(3)], [torch.tensor(4.0), torch.tensor(0.0)]
    scalars: dict[str, Any] = {"grad_scale": make(4.0), "found_inf": make(0.0), "norm": make(8.0), "max_norm": 0.5}
    op = AdamWStep(lr=make(0.0625), betas=(0.9, 0.99), weight_decay=0.1, maximize=True, **scalars)
    called(op, params=params, grads=rows(4), exp_avgs=firsts, exp_avg_sqs=seconds, state_steps=steps)
    return params + firsts + seconds + steps


def called(op: Operation, **lists: list[Tensor]) -> Any:
    """As the backend is called, without what the public function does to numbers."""
    return cuda.BACKEND.operations[type(op)](op, Operands(lists, range(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("call", [perturb, combine, random_perturb, sgd, adamw])
def test_scalars_on_the_device_are_the_numbers(call: Callable[[Callable[[float], Any]], list[Tensor]], dtype: torch.dtype) -> None:
    found = call(lambda value: torch.tensor(value, dtype=dtype))
    assert_same_bits(call.__name__, found, call(float))
