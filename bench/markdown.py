"""Result files as Markdown: a short table for a page of many, all tables for one of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.page import count, table
from bench.providers import PROVIDERS, REFERENCE
from bench.tables import (
    Case,
    Cell,
    cases,
    format_gbps,
    format_ms,
    format_speedup,
    main_result,
    op_rows,
    regimes_that_differ,
    speedups,
    title,
)
from bench.workloads import DTYPES, WORKLOADS

__all__ = ["docs_section", "short_section"]

Result = dict[str, Any]
Row = dict[str, Any]
PEERS = ("pytorch_optimizer", "unifiedsam")  # whose steps are in the tables
OP_HEADINGS = ("", "median", "20–80 %", "over native", "GB/s", "of floor", "floor")
ALT = "Time of a whole optimizer step of each alternative, in units of sam_kernels (shorter is faster)"


def _where(results: Sequence[Result]) -> str:
    """One sentence on what was measured where."""
    first = results[0]
    commits = sorted({f"{result['commit']}{' with local changes' if result['dirty'] else ''}" for result in results})
    regimes = ", ".join(dict.fromkeys(result["allocator"] for result in results))
    load = max(result["load_1min"] for result in results)
    busy = f" Taken on a busy machine (load {load})." if load > 0.5 * first["cores"] else ""
    peers = "".join(f", {name} {version}" for name, version in first.get("peers", {}).items() if name in PEERS)
    return (
        f"{first['cpu']}, {count(first['threads'], 'thread')}, {first['instruction_set']}, torch {first['torch']}{peers}, "
        f"commit {', '.join(commits)}; "
        f"allocator: {regimes}.{busy}"
    )


def short_section(results: Sequence[Result], image: str) -> str:
    """Return ratios only: a table of ordinary steps, and one of m-SAM's where there are any."""
    main = main_result(results)
    found = cases([main])
    ordinary, of_micro_batches = ([case for case in found if (case.micro_batches > 1) is wanted] for wanted in (False, True))
    note = (
        "Whole optimizer step (ascent and descent, without forward and backward): its median, and how many times longer the others take, "
        "the median of the ratios within a round."
    )
    parts = [note, *(_ratio_table(main, some) for some in (ordinary, of_micro_batches) if some)]
    return "\n\n".join([*parts, f"![{ALT}]({image})", _where([main])])


def _ratio_table(result: Result, found: Sequence[Case]) -> str:
    """A column a case, a row a provider."""
    columns = {case: speedups([result], case) for case in found}
    present = [name for name in PROVIDERS if name != REFERENCE and any(name in cells for cells in columns.values())]
    rows = [[f"**{title(REFERENCE)}**", *(format_ms(columns[case][REFERENCE].ms) if REFERENCE in columns[case] else "–" for case in found)]]
    rows += [
        [title(name), *(format_speedup(columns[case][name].speedup) if name in columns[case] else "–" for case in found)]
        for name in present
    ]
    return table(["", *(case.title for case in found)], rows)


def _step_table(results: Sequence[Result], case: Case) -> str:
    """With a column for each other allocator regime in which a median differs by more than the spread."""
    others = regimes_that_differ(results, case)
    rows = []
    for name, cell in speedups(results, case).items():
        more = [_in_regime(cells.get(name)) for cells in others.values()]
        rows.append(
            [title(name), format_ms(cell.ms), f"{format_ms(cell.ms_20)} – {format_ms(cell.ms_80)}", format_speedup(cell.speedup), *more]
        )
    return table(["", "median", "20–80 %", "takes longer by", *(f"allocator: {regime}" for regime in others)], rows)


def _in_regime(cell: Cell | None) -> str:
    return "–" if cell is None else f"{format_ms(cell.ms)} ({format_speedup(cell.speedup)})"


def _op_tables(result: Result) -> Iterable[str]:
    for workload in WORKLOADS:
        for dtype in DTYPES:
            found = op_rows(result, workload, dtype)
            if not found:
                continue
            rows = [_op_row(op, backend, row) for op, by_backend in found.items() for backend, row in by_backend.items()]
            shown = [column for column in range(len(OP_HEADINGS)) if any(row[column] != "–" for row in rows)]
            heading = f"### Operations: {WORKLOADS[workload].title}, {dtype}"
            yield heading + "\n\n" + table([OP_HEADINGS[i] for i in shown], ([row[i] for i in shown] for row in rows))


def _op_row(op: str, backend: str, row: Row) -> list[str]:
    of_floor = row.get("of_floor_50")
    floor = f"{row['floor']}, {row['floor_gbps']:.1f} GB/s" if row["floor"] else "–"
    times = [format_ms(row["ms_50"]), f"{format_ms(row['ms_20'])} – {format_ms(row['ms_80'])}", format_speedup(row.get("over_native_50"))]
    return [f"`{op}` {backend}", *times, format_gbps(row), "–" if of_floor is None else f"{100 * of_floor:.0f} %", floor]


def _memory_table(result: Result) -> Iterable[str]:
    rows = []
    for row in result["rows"]:
        if row["kind"] == "memory":
            size = row["numel"] * DTYPES[row["dtype"]].itemsize
            shown = ["–" if row[key] is None else f"{row[key] / size:.2f}" for key in ("held_bytes", "peak_bytes")]
            rows.append([f"{title(row['backend'])}: {Case(row['workload'], row['dtype'], row['base']).title}", *shown])
    if rows:
        heading = "### Memory beyond parameters, gradients and base state, in copies of the parameters"
        yield heading + "\n\n" + table(["", "held between steps", "peak of a step"], rows)


def docs_section(results: Sequence[Result], image: str) -> str:
    main = main_result(results)
    parts = [_where(results), f"![{ALT}]({image})"]
    parts += [f"### Whole step: {case.title}\n\n{_step_table(results, case)}" for case in cases([main])]
    measured = {row["backend"] for row in main["rows"] if row["kind"] == "step"}
    notes = [f"- {title(name)}: {provider.note}." for name, provider in PROVIDERS.items() if provider.note and name in measured]
    parts += ["\n".join(notes), *_op_tables(main), *_memory_table(main)]
    return "\n\n".join(part for part in parts if part)
