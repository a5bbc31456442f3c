"""The last lines of ``make gpu``: what was measured as far as there is room, a line a phase, and at the very end what was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.gpu import bars, products, sanitize, sweep, sweep_products
from bench.gpu.calls import TESTS
from bench.gpu.phases import Outcome
from bench.gpu.summary import bench_lines, winner_lines

__all__ = ["ROOM", "closing", "failure_lines", "is_red", "phase_line", "tables"]

ROOM = 6_000  # characters: the end of a run is often all that is kept of its output
FAILED_NAMES = 3
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
    words = outcome.tail(1)[0].strip("= ") if outcome.lines and not outcome.is_green else ""
    if outcome.phase.name in sanitize.TOOLS:
        words = sanitize.verdict(outcome.phase.name, outcome.code, outcome.output)[0]
    elif outcome.phase.name in TESTS and outcome.rows:
        found = _tests(outcome)
        words = ", ".join(f"{len(rows)} {state}" for state, rows in found.items() if rows)
        names = [row["name"].rpartition("::")[2] for row in found["failed"]]
        words += f": {', '.join(names[:FAILED_NAMES])}{', …' if len(names) > FAILED_NAMES else ''}" if names else ""
    elif outcome.rows:
        absent = sum(line.startswith("left out: ") for line in outcome.lines)
        words = f"{len(outcome.rows)} rows" + (f", {absent} left out (log.txt says why)" if absent else "")
    elif outcome.phase.name == "build":
        words = (outcome.tail(1) or [""])[0]
    state = outcome.state if outcome.code is None else f"{outcome.state}, {outcome.seconds:.0f} s"
    return f"{outcome.phase.name:<10} {state}{': ' + words[:300] if words else ''}"


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
    found = [
        winner_lines(rows),
        [*sweep.short_lines(rows), *sweep_products.lines(rows)] if swept else [],
        bench_lines(result) if "bandwidth" in result and any(row["kind"] in ("op", "step") for row in rows) else [],
        products.lines(rows),
    ]
    return [block for block in found if block]


def _length(lines: Sequence[str]) -> int:
    return sum(len(line) + 1 for line in lines)


def closing(result: Result, lines: Sequence[str], *, room: int = ROOM) -> list[str]:
    """``lines``: those of the phases. Together less than ``room`` characters."""
    asked = bars.lines(result["rows"]) if any(not row["kind"].startswith("sweep") for row in result["rows"]) else []
    if _length(asked) + _length(lines) > room:
        measured = [line for line in asked if not line.endswith("not measured")]
        asked = [*measured, f"and {len(asked) - len(measured)} figures that were not measured (summary.txt)"]
    left = room - _length(asked) - _length(lines)
    shown: list[str] = []
    for block in tables(result):
        if _length(block) <= left:
            shown += block
            left -= _length(block)
    return [*shown, *lines, *asked]
