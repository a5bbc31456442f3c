"""``info``: what runs here, and why the rest does not."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
from typing import Any

import click
import torch

import sam_kernels
from sam_kernels import _dispatch
from sam_kernels.cli import openmp

__all__ = ["info"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def info(as_json: bool) -> None:
    """Backends (available, or the reason not), versions, instruction set, threads, OpenMP runtime, devices."""
    facts = _collect()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for name, backend in facts["backends"].items():
        state = f"available on {', '.join(backend['devices'])}: {backend['detail']}" if backend["devices"] else f"no: {backend['reason']}"
        click.echo(f"{name + ' backend':<18}{state}")
    for name, version in facts["versions"].items():
        click.echo(f"{name:<18}{version or 'not installed'}")
    click.echo(f"{'instruction set':<18}{facts['instruction_set'] or 'none: no compiled CPU kernels'} ({facts['machine']})")
    click.echo(f"{'CUDA kernels':<18}{facts['cuda_kernels']}")
    click.echo(f"{'threads':<18}{facts['threads']}")
    click.echo(f"{'OpenMP runtime':<18}{facts['openmp']}")
    for i, device in enumerate(facts["devices"]):
        click.echo(f"{'devices' if i == 0 else '':<18}{device}")


def _collect() -> dict[str, Any]:
    device_types = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "backends": {name: _backend(name, device_types) for name in _dispatch.BACKENDS},
        "versions": {
            "sam_kernels": sam_kernels.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "triton": _version("triton"),
        },
        "instruction_set": _instruction_set(),
        "cuda_kernels": _cuda_kernels(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "openmp": openmp.summary(openmp.loaded_runtimes()),
        "openmp_runtimes": openmp.loaded_runtimes(),
        "devices": ["cpu"] + [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())],
    }


def _backend(name: str, device_types: list[str]) -> dict[str, Any]:
    reasons = {device: _dispatch.reason_missing(name, device) for device in device_types}
    devices = [device for device, reason in reasons.items() if reason is None]
    if not devices:
        return {"devices": [], "detail": None, "reason": reasons[device_types[-1]]}
    with _dispatch.use_backend(name):
        detail = "; ".join(dict.fromkeys(_dispatch.select(device).describe() for device in devices))
    missing = [f"{device}: {reason}" for device, reason in reasons.items() if reason is not None]
    return {"devices": devices, "detail": detail, "reason": "; ".join(missing) or None}


def _cuda_kernels() -> str:
    """What the CUDA module was built for, and why it cannot be used where that is so."""
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
    """Of a package that can be imported, not one that is merely recorded as installed."""
    try:
        version: str = importlib.import_module(package).__version__
    except ImportError:
        return None
    return version
