"""Phases of ``make gpu``: processes of their own, each with a time limit, so that one that hangs cannot eat the rest."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Outcome", "Phase", "run_together", "xdist_options"]

ROOT = Path(__file__).resolve().parents[2]
GRACE = 8.0  # seconds between asking a process to end, so that it writes what it has, and killing it
SPARE_CORES, MOST_WORKERS = 4, 12


@dataclass(frozen=True)
class Phase:
    name: str
    command: tuple[str, ...]
    seconds: float
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """``code``: None where the time was up."""

    phase: Phase
    code: int | None
    seconds: float
    output: str

    @property
    def is_green(self) -> bool:
        return self.code == 0

    @property
    def state(self) -> str:
        if self.code is None:
            return f"cut off after {self.seconds:.0f} s"
        return "ok" if self.code == 0 else f"failed (exit code {self.code})"

    def tail(self, count: int) -> list[str]:
        return self.output.rstrip().splitlines()[-count:]


def xdist_options(cores: int | None = None) -> list[str]:
    """pytest in several processes where pytest-xdist is there: kernels are compiled side by side."""
    cores = cores or os.cpu_count() or 1
    if importlib.util.find_spec("xdist") is None or cores < 4:
        return []
    return ["-n", str(max(2, min(MOST_WORKERS, cores - SPARE_CORES)))]


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and everything it started. Asked first: pytest then writes its results, the benchmark has written its own."""
    for kind, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, GRACE)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with contextlib.suppress(ProcessLookupError):  # what it started may outlive it
        os.killpg(process.pid, signal.SIGKILL)


def run_together(phases: Sequence[Phase], log: Path, say: Callable[[str], None], *, until: float) -> list[Outcome]:
    """Runs phases side by side. Their output goes, one after the other, to the end of ``log``; ``until``: nobody runs past it."""
    started, parts = time.monotonic(), [log.with_name(f"{log.stem}.{phase.name}.part") for phase in phases]
    processes = []
    for phase, part in zip(phases, parts, strict=True):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **phase.env}
        with part.open("wb") as file:
            processes.append(
                subprocess.Popen(phase.command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            )
    found: dict[str, Outcome] = {}
    try:
        while len(found) < len(phases):
            for phase, part, process in zip(phases, parts, processes, strict=True):
                if phase.name in found:
                    continue
                code, now = process.poll(), time.monotonic()
                if code is None and now < min(started + phase.seconds, until):
                    continue
                if code is None:
                    _end(process)
                found[phase.name] = Outcome(phase, code, now - started, _clean(part.read_text(errors="replace")))
                say(f"{phase.name}: {found[phase.name].state}, {now - started:.0f} s")
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                _end(process)
        with log.open("a") as file:
            for phase, part in zip(phases, parts, strict=True):
                file.write(f"===== {phase.name}: {' '.join(phase.command)}\n{_clean(part.read_text(errors='replace'))}\n")
                part.unlink()
    return [found[phase.name] for phase in phases]


def _clean(text: str) -> str:
    """Without colours, and without the folders of this machine."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text).replace(f"{ROOT}/", "")
