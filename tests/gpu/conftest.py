"""Tests on a device: skipped, with the reason, where there is none.

``SAM_KERNELS_TEST_DEVICE=cpu`` with ``TRITON_INTERPRET=1``, ``SAM_KERNELS_CUDA_ON_HOST=1`` or both is a dry run of those that need no CUDA
of their own: are the tests themselves right?
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

from sam_kernels._dispatch import use_backend
from tests.helpers.devices import DEVICE, KERNELS, reason_without, reason_without_device


def pytest_report_header() -> list[str]:
    if (reason := reason_without_device()) is not None:
        return [f"device tests: {reason}"]
    missing = [f"device tests without {backend}: {reason}" for backend in KERNELS if (reason := reason_without(backend)) is not None]
    if DEVICE != "cuda":
        return [f"device tests: dry run on {DEVICE}", *missing]
    return [f"device tests: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} device(s)", *missing]


@pytest.fixture(autouse=True)
def _on_a_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Errors of kernels come late: waiting here charges them to their own test. A process whose context is broken ends, so that the
    remaining tests run in another (with pytest-xdist)."""
    if (reason := reason_without_device()) is not None:
        pytest.skip(reason)
    if DEVICE != "cuda" and request.node.get_closest_marker("only_cuda"):
        pytest.skip("about CUDA itself: nothing to run on the CPU")
    yield
    if DEVICE == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                print(f"{request.node.nodeid}: {error}", file=sys.__stderr__, flush=True)
                os._exit(3)
            pytest.exit(f"the device is unusable after {request.node.nodeid}: {error}", returncode=1)


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend with kernels for the device in turn, forced."""
    if (reason := reason_without(request.param)) is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with use_backend(request.param):
        yield request.param
