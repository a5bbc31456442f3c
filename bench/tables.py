"""Result files as data: which rows make a table, and how a number is written. No output format here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.providers import BASES, PROVIDERS, REFERENCE
from bench.workloads import WORKLOADS

__all__ = [
    "Case",
    "Cell",
    "cases",
    "format_gbps",
    "format_ms",
    "format_speedup",
    "main_result",
    "op_rows",
    "regimes_that_differ",
    "speedups",
    "title",
]

Row = dict[str, Any]
Result = dict[str, Any]


@dataclass(frozen=True)
class Case:
    workload: str
    dtype: str
    base: str
    micro_batches: int = 1

    @classmethod
    def of(cls, row: Row) -> Case:
        return cls(row["workload"], row["dtype"], row["base"], row.get("micro_batches", 1))

    @property
    def title(self) -> str:
        title = f"{WORKLOADS[self.workload].title}, {BASES[self.base].title}, {self.dtype}"
        return title if self.micro_batches == 1 else f"{title}, m-SAM of {self.micro_batches} micro-batches"


@dataclass(frozen=True)
class Cell:
    """One provider's whole step. ``speedup``: how many times longer it takes than the reference in the same round, median."""

    ms: float
    speedup: float | None
    ms_20: float
    ms_80: float

    @classmethod
    def of(cls, row: Row) -> Cell:
        return cls(row["ms_50"], row["over_reference_50"], row["ms_20"], row["ms_80"])


def title(provider: str) -> str:
    return PROVIDERS[provider].title if provider in PROVIDERS else provider


def format_ms(ms: float) -> str:
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms" if ms >= 1 else f"{ms * 1000:.0f} µs"


def format_speedup(speedup: float | None) -> str:
    return "–" if speedup is None else f"{speedup:.2f}×"


def format_gbps(row: Row) -> str:
    """Of a row whose buffers outgrow the caches; elsewhere bytes do not decide."""
    return f"{row['gbps']:.1f}" if row.get("regime") != "cached" else "–"


def _step_rows(result: Result) -> Iterable[Row]:
    return (row for row in result["rows"] if row["kind"] == "step")


def cases(results: Sequence[Result]) -> list[Case]:
    found = {Case.of(row) for result in results for row in _step_rows(result)}
    order = [*WORKLOADS], [*BASES], ["fp32", "bf16"]
    places = {case: (order[0].index(case.workload), order[1].index(case.base), order[2].index(case.dtype)) for case in found}
    return sorted(found, key=lambda case: (case.micro_batches, *places[case]))


def main_result(results: Sequence[Result]) -> Result:
    """Return the result of the allocator regime that all figures are of: the one that keeps freed memory, where it was measured."""
    by_regime = {result["allocator"]: result for result in results}
    return by_regime.get("keeping") or by_regime.get("default") or results[0]


def speedups(results: Sequence[Result], case: Case) -> dict[str, Cell]:
    """Return a cell for each provider from the main result, the reference first and then the slowest last."""
    cells = {row["backend"]: Cell.of(row) for row in _step_rows(main_result(results)) if Case.of(row) == case}
    return dict(sorted(cells.items(), key=lambda item: (item[0] != REFERENCE, item[1].ms)))


def regimes_that_differ(results: Sequence[Result], case: Case) -> dict[str, dict[str, Cell]]:
    """Return the cells of each other allocator regime in which a provider's median is outside the 20 to 80 % of the main one."""
    main = main_result(results)
    cells = speedups([main], case)
    found = {}
    for result in results:
        others = {} if result is main else speedups([result], case)
        if any(name in cells and not cells[name].ms_20 <= cell.ms <= cells[name].ms_80 for name, cell in others.items()):
            found[result["allocator"]] = others
    return found


def op_rows(result: Result, workload: str, dtype: str) -> dict[str, dict[str, Row]]:
    """{op: {backend: row}}."""
    table: dict[str, dict[str, Row]] = {}
    for row in result["rows"]:
        if row["kind"] == "op" and row["workload"] == workload and row["dtype"] == dtype:
            table.setdefault(row["op"], {})[row["backend"]] = row
    return table
