"""What a result must say about where it was measured. No host name, no path."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.floor import compiler_version

__all__ = ["SCHEMA", "commit", "device_slug", "environment", "last_level_cache_bytes"]

SCHEMA = 1
FLAGS = ("sse2", "avx", "f16c", "avx2", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "asimd", "sve")
WIDEST = ("avx512f", "avx2", "avx", "sve")  # of what some processors of one name have and others have not
ROOT = Path(__file__).parent.parent
PEERS = ("pytorch_optimizer", "unifiedsam", "opacus", "transformers", "accelerate", "lightning", "torchao", "bitsandbytes")  # distributions


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines)) if value}


def cpu_model() -> str:
    info = _cpuinfo()
    return info.get("model name") or info.get("Model") or platform.processor() or platform.machine()


def device_slug() -> str:
    """The processor, its widest instruction set and the cores. A virtual machine may name a whole family of processors ("AMD EPYC")."""
    name = re.sub(r"\((r|tm)\)|@.*", " ", cpu_model().lower())
    widest = next((flag for flag in WIDEST if flag in _cpu_flags()), "")
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {widest}").strip("-") + f"-{os.cpu_count()}-cores"


def _cpu_flags() -> set[str]:
    info = _cpuinfo()
    return set((info.get("flags") or info.get("Features") or "").split())


def last_level_cache_bytes() -> int:
    """Of one package. 32 MiB where the system does not tell."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()).groups()  # type: ignore[union-attr]  # sysfs writes no other
        sizes.append(int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit])
    return max(sizes[1:] or sizes)


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _instruction_set() -> str | None:
    try:
        from sam_kernels import _cpu
    except ImportError:
        return None
    return str(_cpu.instruction_set())


def commit() -> dict[str, Any]:
    """What was measured: None where the sources are no checkout."""
    changed = _git("status", "--porcelain", "--", "sam_kernels", "csrc", "bench", ":!bench/results")
    return {"commit": _git("rev-parse", "--short=12", "HEAD"), "dirty": None if changed is None else bool(changed)}


def _peers() -> dict[str, str]:
    """The versions of the packages that results are compared with; those that are not installed are left out."""
    found = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    info = _cpuinfo()
    present = _cpu_flags()
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        **commit(),
        "device": device_slug(),
        "cpu": cpu_model(),
        "cpu_family_model_stepping": "/".join(info.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "cpu_flags": [flag for flag in FLAGS if flag in present],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "load_1min": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "peers": _peers(),
        "python": platform.python_version(),
        "compiler": compiler_version(),
        "instruction_set": _instruction_set(),
    }
