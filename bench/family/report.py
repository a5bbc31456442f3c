"""``python -m bench.family.report FILE``: the section of docs/family.md from a result file. ``--check``: is it up to date?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench.family.bars import as_table
from bench.family.methods import METHODS
from bench.family.tables import cases, loop_title
from bench.page import page_command, table, where
from bench.providers import BASES, REFERENCE
from bench.tables import format_ms, format_speedup
from bench.workloads import WORKLOADS

__all__ = ["section"]

Row = dict[str, Any]


def section(result: dict[str, Any]) -> str:
    """Markdown: the figures to reach, a table a method, and where it was measured."""
    lines = [
        *as_table(result["rows"]),
        "",
        "The first line of a table is our step; its bytes stand in the heading (N s: one sweep). The others are how many times as long "
        "they take: the median of the ratios within a round.",
    ]
    measured_cases = cases(result["rows"])
    for name, method in METHODS.items():
        columns = {case: rows for case, rows in measured_cases.items() if case[0] == name}
        if columns:
            headings = [f"{WORKLOADS[workload].title}, {BASES[base].title}: {method.passes(base)} N s" for _, workload, base in columns]
            lines += ["", f"**{method.title}**", "", table(("", *headings), _lines(list(columns.values())))]
    measured = {row["method"] for row in result["rows"]}
    notes = {provider.note: method.title for method in METHODS.values() if method.name in measured for provider in method.providers}
    lines += [f"\n{title}: pytorch_optimizer {note}." for note, title in notes.items() if note]
    copies: dict[int, list[str]] = {}
    for name, method in METHODS.items():
        if name in measured and method.copied:
            copies.setdefault(method.copied, []).append(method.title.partition(",")[0])
    lines += [
        f"\n{', '.join(titles)}: {copied} N s are a copy of the first gradients, which the benchmark keeps. After a backward pass the "
        "optimizer takes them over."
        for copied, titles in copies.items()
    ]
    return "\n".join([*lines, "", f"{where(result)}; load when it began: {result['load_1min']}."])


def _lines(columns: Sequence[Sequence[Row]]) -> Iterator[list[str]]:
    """A line a loop, ours first and then the slowest of the first case last."""
    by_loop: dict[str, list[Row | None]] = {}
    for number, rows in enumerate(columns):
        for row in rows:
            by_loop.setdefault(row["backend"], [None] * len(columns))[number] = row
    for found in by_loop.values():
        yield [loop_title(next(filter(None, found))), *map(_cell, found)]


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    return format_ms(row["ms_50"]) if row["backend"] == REFERENCE else format_speedup(row["over_reference_50"])


main = page_command(section, "family.md")

if __name__ == "__main__":
    main(prog_name="python -m bench.family.report")
