"""The tables at the end of a run, on the terminal."""

from __future__ import annotations

import itertools
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.tables import Case, cases, format_gbps, format_ms, format_speedup, op_rows, speedups, title
from bench.workloads import DTYPES, WORKLOADS

__all__ = ["print_summary"]


def print_summary(result: dict[str, Any], console: Console) -> None:
    for case in cases([result]):
        table = Table(title=f"{case.title} (allocator: {result['allocator']})", title_justify="left")
        table.add_column("whole step")
        for heading in ("median", "20–80 %", "GB/s", "over sam_kernels"):
            table.add_column(heading, justify="right")
        gbps = {row["backend"]: format_gbps(row) for row in result["rows"] if row["kind"] == "step" and Case.of(row) == case}
        for provider, cell in speedups([result], case).items():
            spread = f"{format_ms(cell.ms_20)} – {format_ms(cell.ms_80)}"
            table.add_row(title(provider), format_ms(cell.ms), spread, gbps[provider], format_speedup(cell.speedup))
        console.print(table)
    for workload, dtype in itertools.product(WORKLOADS, DTYPES):
        rows = op_rows(result, workload, dtype)
        if rows:
            console.print(_op_table(workload, dtype, rows))
    memory = [row for row in result["rows"] if row["kind"] == "memory"]
    if memory:
        table = Table("memory beyond parameters, gradients and base state", "case", title_justify="left")
        for heading in ("held, × parameters", "peak, × parameters"):
            table.add_column(heading, justify="right")
        for row in memory:
            size = row["numel"] * DTYPES[row["dtype"]].itemsize
            shown = ("–" if row[key] is None else f"{row[key] / size:.2f}" for key in ("held_bytes", "peak_bytes"))
            table.add_row(title(row["backend"]), f"{row['workload']} {row['base']} {row['dtype']}", *shown)
        console.print(table)


def _op_table(workload: str, dtype: str, rows: dict[str, dict[str, dict[str, Any]]]) -> Table:
    regime = next(iter(next(iter(rows.values())).values()))["regime"]
    table = Table(title=f"{WORKLOADS[workload].title}, {dtype}, single operations ({regime})", title_justify="left")
    for heading in ("operation", "on"):
        table.add_column(heading)
    for heading in ("median", "20–80 %", "over native", "GB/s", "% of floor"):
        table.add_column(heading, justify="right")
    table.add_column("floor")
    for op, by_backend in rows.items():
        for backend, row in by_backend.items():
            of_floor = "–" if row["of_floor_50"] is None else f"{100 * row['of_floor_50']:.0f}"
            times = [
                format_ms(row["ms_50"]),
                f"{format_ms(row['ms_20'])} – {format_ms(row['ms_80'])}",
                format_speedup(row["over_native_50"]),
            ]
            described = f"{row['floor']} {row['floor_gbps']:.1f} GB/s" if row["floor"] else "–"
            table.add_row(op, backend, *times, format_gbps(row), of_floor, described)
    return table
