"""What the CUDA backend says where it cannot run: without a device, or on one it was not built for. No device is needed."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
import torch

from sam_kernels import _dispatch
from sam_kernels.backends.native import CUDA_ON_HOST
from sam_kernels.backends.native._architectures import runs_on
from sam_kernels.operations import CheckFinite, Operands, Restore

DEFAULT = "8.0;9.0;10.0;12.0+PTX"


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        (DEFAULT, {80, 86, 89, 90, 100, 103, 120, 121, 130}, {70, 75, 110}),
        ("8.0", {80, 86, 89}, {75, 90, 100}),
        ("8.6", {86, 89}, {80, 90}),
        ("9.0+PTX", {90, 100, 120}, {80, 89}),
        ("8.0+PTX 9.0a", {80, 89, 90, 100}, {75}),
        ("9.0a", {90}, {80, 100, 91}),
        ("9.0a+PTX", {90}, {100, 120}),
        ("10.0f", {100, 103}, {90, 110, 120}),
        ("10.0f+PTX", {100, 103}, {110, 120}),
        ("host", set(), {80, 90}),
        ("", set(), {80, 90}),
    ],
)
def test_which_devices_a_binary_runs_on(architectures: str, runs: set[int], does_not: set[int]) -> None:
    assert {capability for capability in runs | does_not if runs_on(architectures, capability)} == runs


@pytest.fixture
def cuda() -> ModuleType:
    """The backend's module, whether or not it can run here."""
    if CUDA_ON_HOST:
        pytest.skip("the backend runs on the host here, which it always can")
    try:
        from sam_kernels.backends.native import cuda
    except ImportError as reason:
        pytest.skip(str(reason))
    return cuda


def with_devices(monkeypatch: pytest.MonkeyPatch, cuda: ModuleType, architectures: str, *capabilities: int) -> None:
    monkeypatch.setattr(cuda._cuda, "reason_missing", lambda: "")
    monkeypatch.setattr(cuda._cuda, "ARCHITECTURES", architectures)
    monkeypatch.setattr(cuda._cuda, "capability", lambda device: capabilities[device])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))


def test_devices_that_it_was_built_for(monkeypatch: pytest.MonkeyPatch, cuda: ModuleType) -> None:
    for capabilities in ((80,), (90, 90), (80, 86, 120)):
        with_devices(monkeypatch, cuda, DEFAULT, *capabilities)
        assert cuda._reason_missing() is None


def test_a_device_that_it_was_not_built_for_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch, cuda: ModuleType) -> None:
    with_devices(monkeypatch, cuda, "8.0;9.0", 90, 100)
    assert cuda._reason_missing() == (
        "sam_kernels._cuda was built for compute capabilities 8.0;9.0, cuda:1 has 10.0; reinstall with TORCH_CUDA_ARCH_LIST=10.0"
    )


def test_no_device_is_told_in_the_words_of_the_runtime(monkeypatch: pytest.MonkeyPatch, cuda: ModuleType) -> None:
    with_devices(monkeypatch, cuda, DEFAULT)
    monkeypatch.setattr(cuda._cuda, "reason_missing", lambda: "no CUDA device: no driver")
    assert cuda._reason_missing() == "no CUDA device: no driver"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device(cuda: ModuleType) -> None:
    """The module can be imported; it says why nothing runs, and whoever calls it nevertheless gets an error, not a crash."""
    assert re.match(r"no CUDA device: .+", cuda._cuda.reason_missing())
    assert cuda._cuda.reason_missing() == cuda.BACKEND.reason_missing
    assert _dispatch.reason_missing("native", "cuda") == cuda.BACKEND.reason_missing
    with pytest.raises(RuntimeError, match=r"^sam_kernels: check_finite_ on cuda:0: no CUDA device: .+ \(cudaError\w+\)$"):
        cuda._cuda.check_finite(CheckFinite(found_inf=None), {"grads": cuda._cuda.TensorList([])}, 0)
    with pytest.raises(TypeError, match="a tensor on another type of device than the kernels'"):
        cuda.restore_(Restore(), Operands({"params": [torch.zeros(3)], "old_params": [torch.zeros(3)]}, range(1)))
