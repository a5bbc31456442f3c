"""Weights by sharpness and draws by them on the device: beside the reference, the other kernels' draws, in graphs, without waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from bench.gpu.launches import record
from sam_kernels import _dispatch
from sam_kernels.functional import sharpness_sample, sharpness_weights
from sam_kernels.validation.backends import AUTOMATIC
from sam_kernels.validation.check import check, combinations
from sam_kernels.validation.options import SHARPNESS_OPTIONS
from sam_kernels.validation.sharpness import SHARPNESS_DTYPES
from tests.helpers.devices import KERNELS, reason_without

pytestmark = pytest.mark.cuda
EVERY = 1 if torch.cuda.is_available() else 11  # of the cases: each is interpreted in a dry run


@pytest.mark.parametrize("backend_name", [*KERNELS, "foreach", AUTOMATIC])
@pytest.mark.parametrize("dtype", SHARPNESS_DTYPES)
@pytest.mark.parametrize("op", SHARPNESS_OPTIONS)
def test_matches_the_reference(op: str, dtype: str, backend_name: str, device: str) -> None:
    """Indices are the reference's: what the kernels draw is the same on every device."""
    if backend_name in KERNELS and (reason := reason_without(backend_name)) is not None:
        pytest.skip(f"backend {backend_name}: {reason}")
    wrong = []
    for case, option in list(combinations(op, dtype))[::EVERY]:
        worst = check(op, [backend_name], dtype, case, option, device=device)[backend_name]
        wrong += [] if worst.passed else [f"{case} {option}: {worst}"]
    assert wrong == []


def calls(device: str) -> Iterator[Callable[[], tuple[Tensor, ...]]]:
    norms, beta = torch.rand(700, device=device), torch.tensor(2.5, device=device)
    for given in (2.5, beta):
        yield lambda given=given: (sharpness_weights(norms, beta=given),)
        for replacement in (True, False):
            yield lambda given=given, replacement=replacement: sharpness_sample(norms, 40, beta=given, replacement=replacement, seed=3)


@pytest.mark.usefixtures("kernels")
def test_the_same_bits_every_time(device: str) -> None:
    for call in calls(device):
        first = call()
        for _ in range(3):
            assert all(torch.equal(ours, expected) for ours, expected in zip(call(), first, strict=True))


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.only_cuda
@pytest.mark.usefixtures("kernels")
def test_one_launch_each(device: str) -> None:
    for call in calls(device):
        call()
        activity = record(call)
        if activity is None:
            pytest.skip("the profiler sees nothing of this device")
        assert (len(activity.kernels), len(activity.copies), len(activity.fills)) == (1, 0, 0), str(activity)


@pytest.mark.only_cuda
@pytest.mark.usefixtures("kernels")
def test_nothing_waits_and_a_graph_follows_norms_and_beta(device: str) -> None:
    norms, beta = torch.rand(700, device=device), torch.tensor(2.5, device=device)

    def call() -> tuple[Tensor, ...]:
        drawn = [sharpness_sample(norms, 40, beta=beta, replacement=replacement, seed=3) for replacement in (True, False)]
        return sharpness_weights(norms, beta=beta), *drawn[0], *drawn[1]

    call()
    torch.cuda.synchronize()
    with no_waiting():
        call()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for value in (1.0, 4.0):
        norms.copy_(torch.rand(700))
        beta.fill_(value)
        expected = call()
        graph.replay()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))


@pytest.mark.only_cuda
def test_the_fallback_does_not_wait(device: str) -> None:
    with _dispatch.use_backend("foreach"):
        for call in calls(device):
            call()
            torch.cuda.synchronize()
            with no_waiting():
                call()


@pytest.mark.only_cuda
def test_a_beta_of_the_device_is_not_looked_at(kernels: str, device: str) -> None:
    """One that is out of range makes weights of no use, and indices that are in range all the same."""
    for value in (torch.nan, -1e300, torch.inf):
        for replacement in (True, False):
            beta = torch.tensor(value, dtype=torch.float64, device=device)
            indices, _ = sharpness_sample(torch.rand(300, device=device), 300, beta=beta, replacement=replacement, seed=1)
            assert ((indices >= 0) & (indices < 300)).all()
