"""``python -m bench.family.report FILE``: the section of docs/family.md from a result file. ``--check``: is it up to date?"""

from __future__ import annotations

from typing import Any

from bench.family.bars import as_table
from bench.family.methods import METHODS
from bench.family.tables import CELLS, HEADINGS, cases, heading
from bench.page import page_command, table, where

__all__ = ["section"]


def section(result: dict[str, Any]) -> str:
    """Markdown: the figures to reach, a table a case, and where it was measured."""
    lines = list(as_table(result["rows"]))
    for case, rows in cases(result["rows"]).items():
        lines += ["", f"**{heading(case)}**", "", table(HEADINGS, ([cell(row) for cell in CELLS] for row in rows))]
    measured = {row["method"] for row in result["rows"]}
    notes = {provider.note: method.title for method in METHODS.values() if method.name in measured for provider in method.providers}
    lines += [f"\n{title}: pytorch_optimizer {note}." for note, title in notes.items() if note]
    lines += [
        f"\n{METHODS[method].title}: {copied} N s are a copy of the first gradients, which the benchmark keeps. After a backward pass the "
        "optimizer takes them over."
        for method in METHODS
        if method in measured and (copied := METHODS[method].copied)
    ]
    return "\n".join([*lines, "", f"{where(result)}; load when it began: {result['load_1min']}."])


main = page_command(section, "family.md")

if __name__ == "__main__":
    main(prog_name="python -m bench.family.report")
