"""Triton's launch path without a device: kernels are compiled for a processor that need not be here, and launching does nothing.

What runs is what runs on a device: :mod:`sam_kernels.backends.triton` from its operations down, and Triton's own binding of arguments,
specialisation, compilation and look-up of compiled kernels. What does not is the call of CUDA's driver at the end, and CUDA's part of
copies to the device, for the tensors are those of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

import sam_kernels
from sam_kernels.backends.triton import BACKEND, _launch

__all__ = ["compiling_only", "takes_cpu_tensors"]

SHARED_BYTES = 227 * 1024  # of a block on sm_90: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
Launch = tuple[str, int]  # name of the kernel, number of programs


class _Utils:
    """What Triton asks of a device before it launches there."""

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: Any) -> tuple[object, str, int, int, int]:
        """Module, function, registers, spilled registers, most threads of a block."""
        return object(), name, 0, 0, 1024


class _Launcher:
    """In the place of Triton's, which calls CUDA."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, programs: int, y: int, z: int, stream: int, function: str, *_: Any) -> None:
        driver.active.on_launch((function, programs * y * z))


class _Driver(DriverBase):  # type: ignore[misc]  # triton has no types
    launcher_cls = _Launcher

    def __init__(self, arch: int, on_launch: Callable[[Launch], object]) -> None:
        self.utils = _Utils()
        self.on_launch = on_launch
        self._target = GPUTarget("cuda", arch, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"offline {self._target.arch}"  # Triton keeps what it has compiled by device: never for one that is there

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched here")  # asked for by launches and benchmarks alone

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is launched here")  # asked for by launches and benchmarks alone

    def get_empty_cache_for_benchmark(self) -> Any:
        raise NotImplementedError("nothing is launched here")  # asked for by launches and benchmarks alone

    def clear_cache(self, cache: Any) -> None:
        raise NotImplementedError("nothing is launched here")  # asked for by launches and benchmarks alone


@contextmanager
def takes_cpu_tensors() -> Iterator[None]:
    """While this is open the Triton backend takes tensors of the CPU, and is the one that is used."""
    with (
        mock.patch.object(BACKEND, "device_types", frozenset({"cpu"})),
        mock.patch.object(_launch, "_compiled", {}),  # nothing that was compiled for another driver is found
        sam_kernels.use_backend("triton"),
    ):
        yield


@contextmanager
def compiling_only(arch: int = 90, on_launch: Callable[[Launch], object] | None = None) -> Iterator[list[Launch]]:
    """While this is open operations on CPU tensors go to Triton, compiled for compute capability ``arch`` (90: 9.0), and nothing runs: what
    they would write stays as it is. The list holds what was launched, in order; with ``on_launch`` that is told instead.

    Raises whatever Triton raises for a kernel that it cannot compile. Not under ``TRITON_INTERPRET=1``.
    """
    launches: list[Launch] = []
    before = dict(vars(driver))
    driver.set_active(_Driver(arch, on_launch or launches.append))
    try:
        with takes_cpu_tensors():
            yield launches
    finally:
        vars(driver).clear()
        vars(driver).update(before)
