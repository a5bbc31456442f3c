"""Result files as data: which rows make a table, and how a number is written. No output format here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.providers import BASES, PROVIDERS, REFERENCE
from bench.workloads import WORKLOADS

__all__ = ["Case", "Cell", "cases", "format_ms", "format_speedup", "op_rows", "speedups", "title"]

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
    """One provider's whole step. ``best_*``: in the allocator regime that suits it best, of those measured."""

    ms: float
    speedup: float | None
    ms_20: float
    ms_80: float
    best_ms: float
    best_speedup: float | None
    best_regime: str


def title(provider: str) -> str:
    return PROVIDERS[provider].title if provider in PROVIDERS else provider


def format_ms(ms: float) -> str:
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms" if ms >= 1 else f"{ms * 1000:.0f} µs"


def format_speedup(speedup: float | None) -> str:
    return "–" if speedup is None else f"{speedup:.1f}×"


def _step_rows(result: Result) -> Iterable[Row]:
    return (row for row in result["rows"] if row["kind"] == "step")


def cases(results: Sequence[Result]) -> list[Case]:
    found = {Case.of(row) for result in results for row in _step_rows(result)}
    order = [*WORKLOADS], [*BASES], ["fp32", "bf16"]
    places = {case: (order[0].index(case.workload), order[1].index(case.base), order[2].index(case.dtype)) for case in found}
    return sorted(found, key=lambda case: (case.micro_batches, *places[case]))


def _ratio(row: Row) -> float | None:
    return None if row["reference_ms_50"] is None else row["ms_50"] / row["reference_ms_50"]


def speedups(results: Sequence[Result], case: Case) -> dict[str, Cell]:
    """By provider, the reference first and then the slowest last. The main figures are those of the default allocator, where it was run."""
    by_provider: dict[str, dict[str, Row]] = {}
    for result in results:
        for row in _step_rows(result):
            if Case.of(row) == case:
                by_provider.setdefault(row["backend"], {})[result["allocator"]] = row
    cells = {}
    for provider, regimes in by_provider.items():
        main = regimes.get("default") or next(iter(regimes.values()))
        best_regime = min(regimes, key=lambda regime: regimes[regime]["ms_50"])
        best = regimes[best_regime]
        cells[provider] = Cell(main["ms_50"], _ratio(main), main["ms_20"], main["ms_80"], best["ms_50"], _ratio(best), best_regime)
    return dict(sorted(cells.items(), key=lambda item: (item[0] != REFERENCE, item[1].ms)))


def op_rows(result: Result, workload: str, dtype: str) -> dict[str, dict[str, Row]]:
    """{op: {backend: row}}."""
    table: dict[str, dict[str, Row]] = {}
    for row in result["rows"]:
        if row["kind"] == "op" and row["workload"] == workload and row["dtype"] == dtype:
            table.setdefault(row["op"], {})[row["backend"]] = row
    return table
