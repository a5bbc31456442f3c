"""Tests on a device: skipped, with the reason, where there is none.

``SAM_KERNELS_TEST_DEVICE=cpu TRITON_INTERPRET=1`` is a dry run of those that need no CUDA of their own: are the tests themselves right?
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

from sam_kernels._dispatch import reason_missing, use_backend

DEVICE = os.environ.get("SAM_KERNELS_TEST_DEVICE", "cuda")


def _reason_to_skip() -> str | None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    return reason_missing("triton", DEVICE)


def pytest_report_header() -> list[str]:
    reason = _reason_to_skip()
    if reason is not None or DEVICE != "cuda":
        return [f"device tests: {reason or f'dry run on {DEVICE}'}"]
    return [f"device tests: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} device(s)"]


@pytest.fixture(autouse=True)
def _on_a_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Errors of kernels come late: waiting here charges them to their own test. A process whose context is broken ends, so that the
    remaining tests run in another (with pytest-xdist)."""
    reason = _reason_to_skip()
    if reason is not None:
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


@pytest.fixture
def triton() -> Iterator[None]:
    with use_backend("triton"):
        yield
