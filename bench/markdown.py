"""Result files as Markdown: a short table for a page of many, all tables for one of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.page import count, table
from bench.providers import PROVIDERS, REFERENCE
from bench.tables import Case, Cell, cases, format_ms, format_speedup, op_rows, speedups, title
from bench.workloads import DTYPES, WORKLOADS

__all__ = ["docs_section", "short_section"]

Result = dict[str, Any]
ALT = "Time of a whole optimizer step of each alternative, in units of sam_kernels (shorter is faster)"


def _where(results: Sequence[Result]) -> str:
    """One sentence on what was measured where."""
    first = results[0]
    commits = sorted({f"{result['commit']}{' with local changes' if result['dirty'] else ''}" for result in results})
    regimes = ", ".join(dict.fromkeys(result["allocator"] for result in results))
    load = max(result["load_1min"] for result in results)
    busy = f" Taken on a busy machine (load {load})." if load > 0.5 * first["cores"] else ""
    return (
        f"{first['cpu']}, {count(first['threads'], 'thread')}, {first['instruction_set']}, torch {first['torch']}, "
        f"commit {', '.join(commits)}; "
        f"allocator: {regimes}.{busy}"
    )


def _ratio(cell: Cell) -> str:
    """The speed-up, and beside it the one over this provider's best allocator regime where that is another."""
    if cell.best_ms >= cell.ms or format_speedup(cell.best_speedup) == format_speedup(cell.speedup):
        return format_speedup(cell.speedup)
    return f"{format_speedup(cell.speedup)} ({format_speedup(cell.best_speedup)})"


def short_section(results: Sequence[Result], image: str) -> str:
    """Speed-ups only: a table of ordinary steps, and one of m-SAM's where there are any."""
    found = cases(results)
    ordinary, of_micro_batches = ([case for case in found if (case.micro_batches > 1) is wanted] for wanted in (False, True))
    note = (
        "Whole optimizer step (ascent and descent, without forward and backward): its median, and how many times longer the others take. "
        "In brackets: against the other's best allocator regime, where that is not the default."
    )
    parts = [note, *(_speedup_table(results, some) for some in (ordinary, of_micro_batches) if some)]
    return "\n\n".join([*parts, f"![{ALT}]({image})", _where(results)])


def _speedup_table(results: Sequence[Result], found: Sequence[Case]) -> str:
    """A column a case, a row a provider."""
    columns = {case: speedups(results, case) for case in found}
    present = [name for name in PROVIDERS if name != REFERENCE and any(name in cells for cells in columns.values())]
    rows = [[f"**{title(REFERENCE)}**", *(format_ms(columns[case][REFERENCE].ms) if REFERENCE in columns[case] else "–" for case in found)]]
    rows += [[title(name), *(_ratio(columns[case][name]) if name in columns[case] else "–" for case in found)] for name in present]
    return table(["", *(case.title for case in found)], rows)


def _step_table(results: Sequence[Result], case: Case) -> str:
    rows = []
    for name, cell in speedups(results, case).items():
        best = f"{format_ms(cell.best_ms)} ({format_speedup(cell.best_speedup)}, {cell.best_regime})"
        rows.append(
            [title(name), format_ms(cell.ms), f"{format_ms(cell.ms_20)} – {format_ms(cell.ms_80)}", format_speedup(cell.speedup), best]
        )
    return table(["", "median", "20–80 %", "takes longer by", "best allocator regime"], rows)


def _op_tables(result: Result) -> Iterable[str]:
    for workload in WORKLOADS:
        for dtype in DTYPES:
            found = op_rows(result, workload, dtype)
            if not found:
                continue
            rows = []
            for op, by_backend in found.items():
                for backend, row in by_backend.items():
                    percents = ["–" if row[key] is None else f"{row[key]:.0f} %" for key in ("pct_floor", "pct_copy")]
                    floor = f"{row['floor']}, {row['floor_gbps']:.1f} GB/s" if row["floor"] else "–"
                    rows.append([f"`{op}` {backend}", format_ms(row["ms_50"]), f"{row['gbps']:.1f}", *percents, floor])
            heading = f"### Operations: {WORKLOADS[workload].title}, {dtype}"
            yield heading + "\n\n" + table(["", "median", "GB/s", "of floor", "of copy", "floor"], rows)


def _memory_table(results: Sequence[Result]) -> Iterable[str]:
    rows = []
    for result in results:
        for row in result["rows"]:
            if row["kind"] == "memory":
                size = row["numel"] * DTYPES[row["dtype"]].itemsize
                shown = ["–" if row[key] is None else f"{row[key] / size:.2f}" for key in ("held_bytes", "peak_bytes")]
                rows.append([f"{title(row['backend'])}: {Case(row['workload'], row['dtype'], row['base']).title}", *shown])
        if rows:
            break  # memory does not depend on the run
    if rows:
        heading = "### Memory beyond parameters, gradients and base state, in copies of the parameters"
        yield heading + "\n\n" + table(["", "held between steps", "peak of a step"], rows)


def docs_section(results: Sequence[Result], image: str) -> str:
    main = next((result for result in results if result["allocator"] == "default"), results[0])
    parts = [_where(results), f"![{ALT}]({image})"]
    parts += [f"### Whole step: {case.title}\n\n{_step_table(results, case)}" for case in cases(results)]
    notes = [f"- {title(name)}: {provider.note}." for name, provider in PROVIDERS.items() if provider.note]
    parts += ["\n".join(notes), *_op_tables(main), *_memory_table(results)]
    return "\n\n".join(part for part in parts if part)
