"""The last lines of ``make gpu``: what was measured as far as there is room, a line a phase, and at the very end what was asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.gpu import bars, products, sanitize, sweep, sweep_products, training
from bench.gpu.calls import TESTS
from bench.gpu.phases import Outcome
from bench.gpu.summary import bench_lines, winner_lines

__all__ = ["ROOM", "asked", "closing", "failure_lines", "is_red", "phase_line", "tables"]

ROOM = 5_700  # characters, and 6,000 with the verdict: the end of a run is often all that is kept of its output
FAILED_NAMES = 3
WORDS = 300  # characters of a phase's line
FAILURE_ROOM, FAILURE_WIDTH = 1_000, 200  # characters of what one phase said, and of a line of it
Result = Mapping[str, Any]


def _tests(outcome: Outcome) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {"passed": [], "failed": [], "skipped": []}
    for row in outcome.rows:
        if row["kind"] == "test":
            found[row["outcome"]].append(row)
    return found


def is_red(outcome: Outcome) -> bool:
    """Whether a phase says that something of ours is wrong. Tests that were cut off are not, nor a run without tests (exit code 5)."""
    if outcome.phase.name in sanitize.TOOLS:
        return sanitize.verdict(outcome.phase.name, outcome.code, outcome.output)[1]
    return outcome.phase.name in TESTS and (bool(_tests(outcome)["failed"]) or outcome.code not in (None, 0, 5))


def phase_line(outcome: Outcome) -> str:
    state = outcome.state if outcome.code is None else f"{outcome.state}, {outcome.seconds:.0f} s"
    words = _words(outcome)
    return f"{outcome.phase.name:<10} {state}{': ' + words[:WORDS] if words else ''}"


def _words(outcome: Outcome) -> str:
    absent = [line for line in outcome.lines if line.startswith("left out: ")]
    if outcome.phase.name in sanitize.TOOLS:
        return sanitize.verdict(outcome.phase.name, outcome.code, outcome.output)[0]
    if outcome.phase.name in TESTS and outcome.rows:
        found = _tests(outcome)
        counts = ", ".join(f"{len(rows)} {state}" for state, rows in found.items() if rows)
        names = [row["name"].rpartition("::")[2] for row in found["failed"]]
        more = ", …" if len(names) > FAILED_NAMES else ""
        return "; ".join([counts + (f": {', '.join(names[:FAILED_NAMES])}{more}" if names else ""), *absent])
    if outcome.rows:
        return f"{len(outcome.rows)} rows" + (f", {len(absent)} left out (log.txt says why)" if absent else "")
    return (outcome.tail(1) or [""])[0].strip("= ") if outcome.phase.name == "build" or not outcome.is_green else ""


def failure_lines(outcome: Outcome) -> list[str]:
    """The end of what a phase said that is red or has failed."""
    if not is_red(outcome) and outcome.code in (None, 0, 5):
        return []
    found: list[str] = []
    for line in reversed(outcome.lines):
        shown = f"  {outcome.phase.name} | {line.strip()[:FAILURE_WIDTH]}"
        if line.strip() and _length([*found, shown]) > FAILURE_ROOM:
            break
        found += [shown] if line.strip() else []
    return found[::-1]


def tables(result: Result) -> list[list[str]]:
    """Blocks of lines, the most telling first."""
    rows = result["rows"]
    swept = any(row["kind"].startswith("sweep") for row in rows)
    is_measured = "bandwidth" in result and any(row["kind"] in ("op", "step") for row in rows)
    found = [
        _made(lambda: winner_lines(rows)),
        _made(lambda: [*sweep.short_lines(rows), *sweep_products.lines(rows)] if swept else []),
        _made(lambda: bench_lines(result) if is_measured else []),
        _made(lambda: products.lines(rows)),
        _made(lambda: training.lines(rows)),
    ]
    return [block for block in found if block]


def asked(result: Result) -> list[str]:
    """The bars, if anything was measured that they could be about."""
    return _made(lambda: bars.lines(result["rows"]) if any(not row["kind"].startswith("sweep") for row in result["rows"]) else [])


def _made(make: Callable[[], list[str]]) -> list[str]:
    """A table that cannot be made costs no other."""
    try:
        return make()
    except Exception as error:
        return [f"left out: a table: {type(error).__name__}: {str(error)[:200]}"]


def _length(lines: Sequence[str]) -> int:
    return sum(len(line) + 1 for line in lines)


def _tells(line: str) -> bool:
    """Whether a line of the bars is a heading, or about something that was measured."""
    return line.startswith("bars: ") or re.search(r" (pass|FAIL|told)\b", line) is not None


def closing(result: Result, lines: Sequence[str], *, room: int = ROOM) -> list[str]:
    """``lines``: those of the phases. Together less than ``room`` characters."""
    last = asked(result)
    if _length(last) + _length(lines) > room:
        measured = [line for line in last if _tells(line)]
        last = [*measured, f"and {len(last) - len(measured)} figures that were not measured (summary.txt)"]
    left = room - _length(last) - _length(lines)
    shown: list[str] = []
    for block in tables(result):
        if _length(block) <= left:
            shown += block
            left -= _length(block)
    return [*shown, *lines, *last]
