"""What the benchmarks' command lines share: where they say something, and where results go."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import allocator, gate
from bench.environment import environment

__all__ = ["RESULTS", "begin", "new_result", "write"]

RESULTS = Path(__file__).parent / "results"
_BUSY = (
    "busy machine (load {load:.1f} on {cores} cores): these numbers are worth little. Peers meet at many more barriers a step than "
    "one fused pass does, so a stolen core slows them more."
)


def begin(threads: int | None) -> Console:
    """The console, wide enough for tables where it is none, once it was told that the machine is busy. Sets torch's threads."""
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    if os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
        console.print(_BUSY.format(load=os.getloadavg()[0], cores=os.cpu_count()), style="bold yellow", highlight=False)
    return console


def new_result(with_gate: bool, tests: Sequence[str]) -> dict[str, Any]:
    """Return a result without rows, once the tests have passed: where it is measured, in which allocator regime, and the gate's line.

    The load is that before the tests, which make one of their own.
    """
    where = environment()
    passed = gate.run(tests=tests) if with_gate else "skipped"
    return where | {"allocator": allocator.current(os.environ), "gate": passed, "rows": []}


def write(result: dict[str, Any], json_path: Path | None, name: str | None, *, indent: int | None = 1) -> None:
    """To ``json_path``, and as bench/results/<device>/<name>.json, where they are given."""
    for path in (json_path, None if name is None else RESULTS / result["device"] / f"{name}.json"):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=indent) + "\n")
