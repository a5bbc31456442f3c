"""The OpenMP runtimes that this process has loaded. Two of them have two thread pools, which compete for the cores."""

from __future__ import annotations

import re
from pathlib import Path

import torch

__all__ = ["loaded_runtimes", "summary"]

_RUNTIME = re.compile(r"lib(gomp|iomp5|omp)\b[^/]*\.so[^/]*$")


def loaded_runtimes(maps: Path = Path("/proc/self/maps")) -> list[str] | None:
    """Paths of the OpenMP libraries mapped into the process; None where the system has no such map."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return None
    paths = {fields[5] for fields in (line.split(maxsplit=5) for line in lines) if len(fields) == 6}
    return sorted(path for path in paths if _RUNTIME.search(path))


def _is_torchs(path: str) -> bool:
    package = Path(torch.__file__).resolve().parent
    folders = Path(path).resolve().parents
    return package in folders or package.with_name("torch.libs") in folders


def summary(runtimes: list[str] | None) -> str:
    if runtimes is None:
        return "unknown (no /proc/self/maps)"
    if not runtimes:
        return "none loaded"
    named = [f"{path} ({'torch' if _is_torchs(path) else 'not torch'}'s)" for path in runtimes]
    return named[0] + ", the only one" if len(named) == 1 else f"{len(named)} loaded, expect oversubscribed threads: {', '.join(named)}"
