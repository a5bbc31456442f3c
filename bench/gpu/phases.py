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
    after: str | None = None  # the phase beside it whose end it waits for, however that went


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


def xdist_options(cores: int | None = None, *, most: int = MOST_WORKERS) -> list[str]:
    """pytest in several processes where pytest-xdist is there: kernels are compiled side by side."""
    cores = cores or os.cpu_count() or 1
    if importlib.util.find_spec("xdist") is None or cores < 4:
        return []
    return ["-n", str(max(2, min(most, cores - SPARE_CORES)))]


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and everything it started. Asked first: pytest then writes its results, the benchmark has written its own."""
    for kind, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, GRACE)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with contextlib.suppress(ProcessLookupError):  # what it started may outlive it
        os.killpg(process.pid, signal.SIGKILL)


def _start(phase: Phase, part: Path) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **phase.env}
    with part.open("wb") as file:
        return subprocess.Popen(phase.command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def run_together(phases: Sequence[Phase], log: Path, say: Callable[[str], None], *, until: float) -> list[Outcome]:
    """Runs phases side by side, or ``after`` each other. Their output goes, one after the other, to the end of ``log``; ``until``: nobody
    runs past it. The outcomes are those of the phases that were begun."""
    names = {phase.name for phase in phases}
    parts = {phase.name: log.with_name(f"{log.stem}.{phase.name}.part") for phase in phases}
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    found: dict[str, Outcome] = {}
    try:
        while len(found) < len(phases):
            for phase in phases:
                now = time.monotonic()
                if phase.name in found or (phase.after in names and phase.after not in found):
                    continue
                if phase.name not in running:
                    if now >= until:
                        return list(found.values())
                    running[phase.name] = _start(phase, parts[phase.name]), now
                process, started = running[phase.name]
                code = process.poll()
                if code is None and now < min(started + phase.seconds, until):
                    continue
                if code is None:
                    _end(process)
                found[phase.name] = Outcome(phase, code, now - started, _clean(parts[phase.name].read_text(errors="replace")))
                say(f"{phase.name}: {found[phase.name].state}, {now - started:.0f} s")
            time.sleep(0.05)
    finally:
        for process, _ in running.values():
            if process.poll() is None:
                _end(process)
        with log.open("a") as file:
            for phase in phases:
                if phase.name in running:
                    file.write(f"===== {phase.name}: {' '.join(phase.command)}\n{_clean(parts[phase.name].read_text(errors='replace'))}\n")
                    parts[phase.name].unlink()
    return [found[phase.name] for phase in phases]


def _clean(text: str) -> str:
    """Without colours, and without the folders of this machine."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text).replace(f"{ROOT}/", "")
