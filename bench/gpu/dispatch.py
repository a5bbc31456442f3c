"""Which backend the dispatcher should choose: the faster one of each operation and whole step, workload by workload."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.gpu.steps import BACKENDS, provider

__all__ = ["lines", "rows"]

Row = Mapping[str, Any]
EQUAL = 1.02  # as fast, in words: what repeating a measurement changes
CASE = ("workload", "op", "base", "dtype")


def _milliseconds(row: Row) -> float:
    """Of a loop of such calls: the slower of device and host decides."""
    wall: float | None = row.get("wall_ms")
    return wall if wall is not None else max(row["ms_50"], row["host_us"] / 1000)


def rows(measured: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of kind "dispatch": ``factor`` is how many times longer the loser takes. Only where every backend was measured."""
    backend_of = {"op": {name: name for name in BACKENDS}, "step": {provider(name): name for name in BACKENDS}}
    cases: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in measured:
        backend = backend_of.get(row["kind"], {}).get(row["backend"])
        if backend is not None:
            cases.setdefault(tuple(row[name] for name in CASE), {})[backend] = _milliseconds(row)
    found = []
    for case, times in cases.items():
        if len(times) == len(BACKENDS):
            winner = min(times, key=lambda backend: times[backend])
            factor = max(times.values()) / times[winner]
            found.append({"kind": "dispatch", **dict(zip(CASE, case, strict=True)), "winner": winner, "factor": factor, "ms": times})
    return found


def _words(rows: Sequence[Row]) -> str:
    """Each operation once, with its dtypes."""
    found: dict[str, str] = {}
    for row in rows:
        what = row["op"] if row["base"] is None else f"step {row['base']}"
        found[what] = f"{found.get(what, what)} {row['dtype']} {row['factor']:.2f}"
    return ", ".join(found.values()) or "–"


def lines(measured: Sequence[Row]) -> list[str]:
    """Two lines a workload: whose win what, and by what factor."""
    found = [row for row in measured if row["kind"] == "dispatch"]
    result = [f"the faster backend (host included) and by what factor; the rest within {EQUAL - 1:.0%}"] if found else []
    for workload in dict.fromkeys(row["workload"] for row in found):
        result += list(_of_workload(workload, [row for row in found if row["workload"] == workload]))
    return result


def _of_workload(workload: str, mine: Sequence[Row]) -> Iterator[str]:
    for backend in BACKENDS:
        wins = [row for row in mine if row["winner"] == backend and row["factor"] > EQUAL]
        yield f"  {workload:<10} {backend:<7} {len(wins):>2} of {len(mine)}: {_words(wins)}"
