"""The figures to reach: a whole step against the fastest of the others, GPT-2 124M, float32, SGD with momentum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench.family.methods import METHODS
from bench.per_sample import bars
from bench.per_sample.bars import Bar

__all__ = ["BARS", "as_table", "fastest_peer", "judged", "verdicts"]

Row = dict[str, Any]

WORKLOAD, BASE = "gpt2_124m", "sgd"
BARS = tuple(
    Bar(
        method,
        "time of the fastest other loop over ours, median of the rounds",
        "peer",
        None,
        3.0,
        at_most=False,
        key="over_reference_50",
    )
    for method in ("vasso", "fsam")
)


def fastest_peer(rows: Sequence[Row], method: str, workload: str, base: str) -> Row | None:
    """Return the row of the one that takes the least time, ours apart: the lean loop takes part too."""
    others = {provider.name for provider in METHODS[method].providers if not provider.name.startswith("sam_kernels/")}
    case = (method, workload, base, "fp32")
    found = [row for row in rows if (row["method"], row["workload"], row["base"], row["dtype"]) == case and row["backend"] in others]
    return min(found, key=lambda row: float(row["over_reference_50"]), default=None)


def _peers(rows: Sequence[Row]) -> list[Row]:
    found = {bar.model: fastest_peer(rows, bar.model, WORKLOAD, BASE) for bar in BARS}
    return [{**row, "model": method, "provider": "peer"} for method, row in found.items() if row is not None]


def judged(rows: Sequence[Row]) -> Iterator[tuple[Bar, float, bool]]:
    """Each bar that was measured, the figure, and whether it is reached."""
    return bars.judged(_peers(rows), BARS)


def verdicts(rows: Sequence[Row]) -> Iterator[str]:
    """A line a bar, for the terminal."""
    return bars.verdicts(_peers(rows), BARS)


def as_table(rows: Sequence[Row]) -> Iterator[str]:
    """The lines of a table in Markdown."""
    return bars.as_table(_peers(rows), BARS)
