"""Phases of ``make gpu``: processes of their own, each with a time limit, so that one that hangs cannot eat the rest.

What a process prints goes on at once, line by line: rows of JSON to the record's files of rows, everything else to its log.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.record import Record, row_of

__all__ = ["Outcome", "Phase", "run_together", "xdist_options"]

ROOT = Path(__file__).resolve().parents[2]
GRACE = 4.0  # seconds between asking a process to end and killing it
MOST_LINES = 20_000  # of a phase, in memory
SPARE_CORES, MOST_WORKERS = 4, 12


@dataclass(frozen=True)
class Phase:
    """``until``: by time.monotonic(), when it has to end, or not to begin. ``after``: the phases whose end it waits for, however that went.
    ``stdin``: what it reads, made when it begins."""

    name: str
    command: tuple[str, ...]
    seconds: float
    env: Mapping[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    until: float = math.inf
    stdin: Callable[[], str] | None = None


@dataclass(frozen=True)
class Outcome:
    """``code``: None where the time was up, also where that was so before it could begin (``seconds`` 0)."""

    phase: Phase
    code: int | None
    seconds: float
    lines: tuple[str, ...] = ()
    rows: tuple[Mapping[str, Any], ...] = ()

    @property
    def is_green(self) -> bool:
        return self.code == 0

    @property
    def output(self) -> str:
        """All that it printed beside rows."""
        return "\n".join(self.lines)

    @property
    def state(self) -> str:
        if self.code is None:
            return f"cut off after {self.seconds:.0f} s" if self.seconds else "left out: no time was left"
        return "ok" if self.code == 0 else f"failed (exit code {self.code})"

    def tail(self, count: int) -> list[str]:
        return [line for line in self.lines if line.strip()][-count:]


def xdist_options(cores: int | None = None, *, most: int = MOST_WORKERS) -> list[str]:
    """pytest in several processes where pytest-xdist is there: kernels are compiled side by side."""
    cores = cores or os.cpu_count() or 1
    if importlib.util.find_spec("xdist") is None or cores < 4:
        return []
    return ["-n", str(max(2, min(most, cores - SPARE_CORES)))]


class _Running:
    """A process, and the thread that reads what it prints."""

    def __init__(self, phase: Phase, record: Record) -> None:
        self.phase = phase
        self.record = record
        self.started = time.monotonic()
        self.ends = min(self.started + phase.seconds, phase.until)
        self.asked: float | None = None  # when it was asked to end
        self.lines: deque[str] = deque(maxlen=MOST_LINES)
        self.rows: list[Mapping[str, Any]] = []
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **phase.env}
        record.log(f"===== {phase.name}: {' '.join(phase.command).replace(sys.executable, 'python3')}")
        self.process = subprocess.Popen(
            phase.command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE if phase.stdin is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        if phase.stdin is not None and self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:
                pipe.write(phase.stdin().encode())

    def _read(self) -> None:
        for raw in self.process.stdout or ():
            line = _clean(raw.decode(errors="replace").rstrip("\r\n"))
            if (row := row_of(line)) is not None:
                self.rows.append(row)
                self.record.row(row)
            else:
                self.lines.append(line)
                self.record.log(f"{self.phase.name} | {line}")

    def send(self, kind: signal.Signals) -> None:
        """To the process and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, kind)

    def poll(self) -> Outcome | None:
        """None while it runs. A process whose time is up is asked to end, then killed; the others are not kept waiting for that."""
        code, now = self.process.poll(), time.monotonic()
        if code is None and self.asked is None and now >= self.ends:
            self.asked = now
            self.send(signal.SIGINT)
        if code is None and self.asked is not None and now >= self.asked + GRACE:
            self.send(signal.SIGKILL)
        if code is None and (self.asked is None or now < self.asked + 2 * GRACE):
            return None
        return self.outcome(code if self.asked is None else None)

    def outcome(self, code: int | None) -> Outcome:
        self.send(signal.SIGKILL)  # what it started may outlive it, and hold its output open
        self.reader.join(GRACE)
        return Outcome(self.phase, code, time.monotonic() - self.started, tuple(self.lines), tuple(self.rows))


def run_together(phases: Sequence[Phase], record: Record, say: Callable[[Outcome], None]) -> list[Outcome]:
    """Runs phases side by side, or ``after`` each other; ``say`` is called as each ends."""
    names = {phase.name for phase in phases}
    running: dict[str, _Running] = {}
    found: dict[str, Outcome] = {}

    def ended(outcome: Outcome) -> None:
        running.pop(outcome.phase.name, None)
        found[outcome.phase.name] = outcome
        record.row({"kind": "phase", "name": outcome.phase.name, "state": outcome.state, "seconds": round(outcome.seconds, 1)})
        say(outcome)

    try:
        while len(found) < len(phases):
            for phase in phases:
                now = time.monotonic()
                if phase.name in found or any(name in names and name not in found for name in phase.after):
                    continue
                if phase.name not in running:
                    if now >= phase.until:
                        ended(Outcome(phase, None, 0.0))
                        continue
                    try:
                        running[phase.name] = _Running(phase, record)
                    except OSError as error:  # no such program, no memory for a process
                        ended(Outcome(phase, 127, 0.0, (f"{phase.command[0]} cannot be started: {error.strerror}",)))
                        continue
                if (outcome := running[phase.name].poll()) is not None:
                    ended(outcome)
            time.sleep(0.05)
    finally:
        for kind in (signal.SIGINT, signal.SIGKILL):
            for one in running.values():
                one.send(kind)
            time.sleep(GRACE if running and kind is signal.SIGINT else 0.0)
    return [found[phase.name] for phase in phases]


def _clean(text: str) -> str:
    """Without colours, and without the folders of this machine."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text).replace(f"{ROOT}/", "")
