"""What is there: the device, its driver and clocks, and the versions that decide what was measured."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import shutil
import subprocess
from typing import Any

import torch

from bench.environment import environment
from bench.gpu import carry

__all__ = ["DEFAULT_L2", "describe", "device_name", "gpu_environment", "l2_bytes", "multiprocessors_and_gigahertz", "slug"]

DEFAULT_L2 = 50 << 20  # an H100's, where torch does not tell
_QUERIES = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit", "temperature.gpu")


def device_name() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def l2_bytes() -> int:
    if not torch.cuda.is_available():
        return 0
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or DEFAULT_L2)


@functools.cache
def multiprocessors_and_gigahertz() -> tuple[int, float]:
    """Of the device, at its highest clock; 0 for what is not known."""
    if not torch.cuda.is_available():
        return 0, 0.0
    properties = torch.cuda.get_device_properties(0)
    megahertz = _smi().get("clocks.max.sm", "")
    gigahertz = float(megahertz) / 1e3 if megahertz.isdigit() else getattr(properties, "clock_rate", 0) / 1e6
    return properties.multi_processor_count, gigahertz


def _smi() -> dict[str, str]:
    """What nvidia-smi says; nothing where it is missing or silent. Reads only."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(_QUERIES)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().splitlines()[0].split(",")] if done.stdout.strip() else []
    return dict(zip(_QUERIES, values, strict=False))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_environment() -> dict[str, Any]:
    """As for a run on the CPU, and the device. ``device`` names the folder of its results. A copy of a checkout without its history has the
    commit of the carried modules."""
    name = device_name()
    smi = _smi() if name else {}
    found = environment()
    return (found | carry.carried_commit() if found["commit"] is None else found) | {
        "device": slug(name or "no-device"),
        "gpu": name or "none: a dry run on the CPU",
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory if name else 0,
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count if name else 0,
        "l2_bytes": l2_bytes(),
        "driver": smi.pop("driver_version", None),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "clocks": smi,
        "allocator": "default",
    }


def describe(found: dict[str, Any]) -> list[str]:
    """Lines for a person."""
    clocks = ", ".join(f"{name} {value}" for name, value in found["clocks"].items()) or "unknown"
    memory = f"{found['gpu_memory_bytes'] / 2**30:.0f} GiB, L2 {found['l2_bytes'] / 2**20:.0f} MiB, {found['multiprocessors']} processors"
    return [
        f"device   {found['gpu']}" + (f" ({memory})" if found["gpu_memory_bytes"] else ""),
        f"driver   {found['driver'] or 'unknown'}, CUDA {found['cuda'] or 'none'}",
        f"clocks   {clocks}",
        f"versions python {found['python']}, torch {found['torch']}, triton {found['triton'] or 'none'}",
        f"host     {found['cpu']}, {found['cores']} cores, native CPU module: {found['instruction_set'] or 'not built'}",
    ]
