"""Rows as the cells of tables, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.family.methods import METHODS
from bench.providers import BASES, REFERENCE
from bench.tables import format_ms
from bench.workloads import WORKLOADS

__all__ = ["CELLS", "HEADINGS", "cases", "heading", "loop_title"]

Row = dict[str, Any]
Case = tuple[str, str, str]  # method, workload, base

HEADINGS = ("", "median", "20–80 %", "GB/s by our bytes", "over ours (20 / 50 / 80 %)")


def loop_title(row: Row) -> str:
    return METHODS[row["method"]].timed()[row["backend"]].title


def _over(row: Row) -> str:
    shares = [row[f"over_reference_{share}"] for share in (20, 50, 80)]
    return "–" if None in shares else " / ".join(f"{share:.2f}" for share in shares)


CELLS: tuple[Callable[[Row], str], ...] = (
    loop_title,
    lambda row: format_ms(row["ms_50"]),
    lambda row: f"{format_ms(row['ms_20'])} – {format_ms(row['ms_80'])}",
    lambda row: f"{row['gbps']:.1f}",
    _over,
)


def cases(rows: Sequence[Row]) -> dict[Case, list[Row]]:
    """In the order they were measured, ours first and then the slowest last."""
    found: dict[Case, list[Row]] = {}
    for row in rows:
        found.setdefault((row["method"], row["workload"], row["base"]), []).append(row)
    return {case: sorted(group, key=lambda row: (row["backend"] != REFERENCE, row["ms_50"])) for case, group in found.items()}


def heading(case: Case) -> str:
    method, workload, base = case
    passes = METHODS[method].passes(base)
    return f"{METHODS[method].title}: {WORKLOADS[workload].title}, {BASES[base].title}, {passes} N s"
