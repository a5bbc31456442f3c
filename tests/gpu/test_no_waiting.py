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
from tests.helpers.training import BASES, CAPTURABLE_MEMBERS, closure_of, make, make_member

pytestmark = [pytest.mark.cuda, pytest.mark.only_cuda, pytest.mark.usefixtures("kernels")]
SHAPES = ((1000,), (33, 17), (3,), ())
# Of a whole step. SGD with momentum: norm in two stages, ascent, check of the second gradients, descent. AdamW has one more, which advances
# the counters. What does not fit one launch's arguments takes another, native's counters of a thousand tensors seven.
MOST_LAUNCHES = {"sgd": 5, "adamw": 6}
MOST_OF_MANY = {"sgd": 8, "adamw": 15}  # native, a thousand tensors
# centralize_, direction_norm_, combine_ and grad_dots return numbers of their own at each call. Native's scratch is made anew: sums of
# chunks, bias corrections.
ALLOCATIONS = {
    "native": {
        "grad_norm": 1,
        "centralize_": 2,
        "direction_norm_": 2,
        "grad_dots": 2,
        "combine_": 2,
        "adamw_step_": 1,
        "sgd": 1,
        "adamw": 2,
    },
    "triton": {"centralize_": 1, "direction_norm_": 1, "grad_dots": 1, "combine_": 1},
}


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


def call_of(op: str, backend: str, device: str) -> Callable[[], object]:
    lists: Lists = describe_once(make_lists(op, SHAPES, torch.float32, device))
    if op == "grad_norm":  # as a caller does who does not want the result allocated
        norm, found_inf, skipped = (torch.zeros((), device=device) for _ in range(3))
        return lambda: functional.grad_norm_(norm, lists["grads"], found_inf=found_inf, skipped=skipped)
    return functools.partial(ours(op, backend), lists)


@pytest.mark.parametrize("op", OPS)
def test_an_operation_on_vouched_lists_neither_waits_nor_allocates(op: str, kernels: str, device: str) -> None:
    call = call_of(op, kernels, device)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    before = allocations()
    with no_waiting():
        for _ in range(10):
            call()
    assert allocations() - before == 10 * ALLOCATIONS[kernels].get(op, 0)


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


@pytest.mark.parametrize("name", CAPTURABLE_MEMBERS)
def test_a_step_of_the_family_does_not_wait(name: str, device: str) -> None:
    model, optimizer = make_member(name, device)
    closure = closure_of(optimizer, model)
    for _ in range(4):
        optimizer.step(closure)
    torch.cuda.synchronize()
    with no_waiting():
        for _ in range(5):
            optimizer.step(closure)
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("base", BASES)
def test_a_step_allocates_next_to_nothing(base: str, kernels: str, device: str) -> None:
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
    assert max(counts) <= ALLOCATIONS[kernels].get(base, 0), f"{counts} allocations a step"


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


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("workload", ["many_tiny", "resnet18"])
def test_launches_of_a_step(base: str, workload: str, kernels: str, device: str, record_property: Callable[[str, object], None]) -> None:
    """Gradients that stay where they are cost no copy; nothing is filled."""
    most = (MOST_OF_MANY if (kernels, workload) == ("native", "many_tiny") else MOST_LAUNCHES)[base]
    activity = record(steady_step(base, workload, device))
    if activity is None:
        pytest.skip("the profiler sees nothing of this device")
    record_property("activity", str(activity))
    assert len(activity.kernels) <= most, str(activity)
    assert not activity.copies, str(activity)
    assert not activity.fills, str(activity)


def test_moved_gradients_cost_one_copy_an_operation_or_none(kernels: str, device: str) -> None:
    """Their addresses, from pinned memory; native's travel in the launch."""
    lists = make_lists("restore_", SHAPES, torch.float32, device)
    params, norm = describe_once(lists)["params"], torch.ones((), device=device)
    old_params = describe_once(lists)["old_params"]
    grads = [describe_once(make_lists("grad_norm", SHAPES, torch.float32, device))["grads"] for _ in range(4)]
    for given in grads[:3]:
        functional.perturb_(params, given, old_params, norm, rho=0.1)
    activity = record(lambda: functional.perturb_(params, grads[3], old_params, norm, rho=0.1))
    if activity is None:
        pytest.skip("the profiler sees nothing of this device")
    assert (len(activity.kernels), len(activity.copies)) == (1, int(kernels == "triton")), str(activity)
