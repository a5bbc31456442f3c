"""The facts that ``info`` prints: backends, versions, instruction set, threads, OpenMP runtimes, devices."""

from __future__ import annotations

import importlib
import platform
from dataclasses import dataclass

import torch

import sam_kernels
from sam_kernels import _dispatch
from sam_kernels.cli import openmp

__all__ = ["Machine", "collect"]


@dataclass(frozen=True)
class Backend:
    """A backend on this machine."""

    devices: list[str]  # device types that it runs on
    detail: str | None
    reason: str | None  # why it does not run on the others


@dataclass(frozen=True)
class Machine:
    """A machine and its installation."""

    backends: dict[str, Backend]
    versions: dict[str, str | None]
    instruction_set: str | None  # None: no compiled CPU kernels
    cuda_kernels: str
    machine: str
    threads: int
    openmp: str
    openmp_runtimes: list[str] | None
    devices: list[str]


def collect() -> Machine:
    """Return the facts of this process. Raises nothing for a backend or a package that is missing."""
    device_types = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    runtimes = openmp.loaded_runtimes()
    return Machine(
        backends={name: _backend(name, device_types) for name in _dispatch.BACKENDS},
        versions={
            "sam_kernels": sam_kernels.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "triton": _version("triton"),
        },
        instruction_set=_instruction_set(),
        cuda_kernels=_cuda_kernels(),
        machine=platform.machine(),
        threads=torch.get_num_threads(),
        openmp=openmp.summary(runtimes),
        openmp_runtimes=runtimes,
        devices=["cpu"] + [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())],
    )


def _backend(name: str, device_types: list[str]) -> Backend:
    reasons = {device: _dispatch.reason_missing(name, device) for device in device_types}
    devices = [device for device, reason in reasons.items() if reason is None]
    if not devices:
        return Backend([], None, reasons[device_types[-1]])
    with _dispatch.use_backend(name):
        detail = "; ".join(dict.fromkeys(_dispatch.select(device).describe() for device in devices))
    missing = [f"{device}: {reason}" for device, reason in reasons.items() if reason is not None]
    return Backend(devices, detail, "; ".join(missing) or None)


def _cuda_kernels() -> str:
    """The compute capabilities that the CUDA module was built for, and the reason if it cannot be used."""
    try:
        built: str = importlib.import_module("sam_kernels._cuda").ARCHITECTURES
    except ImportError:
        return "not built (that takes nvcc)"
    reason = _dispatch.reason_missing("native", "cuda")
    return f"built for compute capabilities {built}" + ("" if reason is None else f"; {reason}")


def _instruction_set() -> str | None:
    try:
        chosen: str = importlib.import_module("sam_kernels._cpu").instruction_set()
    except ImportError:
        return None
    return chosen


def _version(package: str) -> str | None:
    """The version of a package that can be imported, not of one that is merely recorded as installed."""
    try:
        version: str = importlib.import_module(package).__version__
    except ImportError:
        return None
    return version
