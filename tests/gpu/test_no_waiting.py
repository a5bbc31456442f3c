"""A steady step never waits for the device, allocates next to nothing there and launches a handful of kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from bench.byte_model import OPS
from bench.gpu.launches import record
from bench.op_calls import Lists, describe_once, make_lists, ours
from bench.providers import BASES as BENCH_BASES
from bench.providers import RHO
from bench.workloads import WORKLOADS, make_grads, make_params
from sam_kernels import SAM, functional
from tests.helpers.training import BASES, closure_of, make

pytestmark = [pytest.mark.cuda, pytest.mark.only_cuda, pytest.mark.usefixtures("triton")]
SHAPES = ((1000,), (33, 17), (3,), ())
MOST_LAUNCHES = 5  # of a whole step with SGD and momentum: norm in two stages, ascent, check of the second gradients, descent
MOST_ALLOCATIONS = 0  # of a whole step
RETURNS_A_NORM = ("direction_norm_",)  # a number of its own at each call


@contextmanager
def no_waiting() -> Iterator[None]:
    """torch raises where one of its own functions would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def allocations() -> int:
    return int(torch.cuda.memory_stats()["allocation.all.allocated"])


def call_of(op: str, device: str) -> Callable[[], object]:
    lists: Lists = describe_once(make_lists(op, SHAPES, torch.float32, device))
    if op == "grad_norm":  # as a caller does who does not want the result allocated
        norm, found_inf, skipped = (torch.zeros((), device=device) for _ in range(3))
        return lambda: functional.grad_norm_(norm, lists["grads"], found_inf=found_inf, skipped=skipped)
    return functools.partial(ours(op, "triton"), lists)


@pytest.mark.parametrize("op", OPS)
def test_an_operation_on_vouched_lists_neither_waits_nor_allocates(op: str, device: str) -> None:
    call = call_of(op, device)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    before = allocations()
    with no_waiting():
        for _ in range(10):
            call()
    assert allocations() - before == 10 * (op in RETURNS_A_NORM)


def test_checking_for_infinities_neither_waits_nor_allocates(device: str) -> None:
    lists = describe_once(make_lists("grad_norm", SHAPES, torch.float32, device))
    found_inf = torch.zeros((), device=device)
    functional.check_finite_(lists["grads"], found_inf)
    before = allocations()
    with no_waiting():
        functional.check_finite_(lists["grads"], found_inf)
    assert allocations() == before


@pytest.mark.parametrize("set_to_none", [True, False], ids=["grads_reallocated", "grads_kept"])
@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"max_grad_norm": 1.0}], ids=["sam", "asam", "clipped"])
@pytest.mark.parametrize("base", BASES)
def test_a_step_does_not_wait(base: str, options: dict[str, Any], set_to_none: bool, device: str) -> None:
    model, optimizer = make(base, device, **options)
    closure = closure_of(optimizer, model, set_to_none=set_to_none)
    for _ in range(4):
        optimizer.step(closure)
    torch.cuda.synchronize()
    with no_waiting():
        for _ in range(5):
            optimizer.step(closure)
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("base", BASES)
def test_a_step_allocates_nothing(base: str, device: str) -> None:
    model, optimizer = make(base, device)
    closure = closure_of(optimizer, model, set_to_none=False)
    for _ in range(4):
        optimizer.step(closure)
    closure()
    counts = []
    for _ in range(3):
        before = allocations()
        optimizer.first_step()
        optimizer.second_step()
        counts.append(allocations() - before)
    assert max(counts) <= MOST_ALLOCATIONS, f"{counts} allocations a step"


def steady_step(base: str, workload: str, device: str) -> Callable[[], None]:
    chosen = BENCH_BASES[base]
    fused = {"fused": True} if base == "adamw" else {}
    params = make_params(make_grads(WORKLOADS[workload].shapes, torch.float32, device=device))
    optimizer = SAM(params, chosen.optimizer, rho=RHO, **chosen.kwargs, **fused)

    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    for _ in range(3):
        step()
    return step


@pytest.mark.parametrize(("base", "most"), [("sgd", MOST_LAUNCHES), ("adamw", MOST_LAUNCHES + 1)])
@pytest.mark.parametrize("workload", ["many_tiny", "resnet18"])
def test_launches_of_a_step(base: str, most: int, workload: str, device: str, record_property: Callable[[str, object], None]) -> None:
    """AdamW has one more, which advances the counters. Gradients that stay where they are cost no copy; nothing is filled."""
    activity = record(steady_step(base, workload, device))
    if activity is None:
        pytest.skip("the profiler sees nothing of this device")
    record_property("activity", str(activity))
    assert len(activity.kernels) <= most, str(activity)
    assert not activity.copies, str(activity)
    assert not activity.fills, str(activity)


def test_moved_gradients_cost_one_copy_an_operation(device: str) -> None:
    """Their addresses, from pinned memory."""
    lists = make_lists("restore_", SHAPES, torch.float32, device)
    params, norm = describe_once(lists)["params"], torch.ones((), device=device)
    old_params = describe_once(lists)["old_params"]
    grads = [describe_once(make_lists("grad_norm", SHAPES, torch.float32, device))["grads"] for _ in range(4)]
    for given in grads[:3]:
        functional.perturb_(params, given, old_params, norm, rho=0.1)
    activity = record(lambda: functional.perturb_(params, grads[3], old_params, norm, rho=0.1))
    if activity is None:
        pytest.skip("the profiler sees nothing of this device")
    assert (len(activity.kernels), len(activity.copies)) == (1, 1), str(activity)
