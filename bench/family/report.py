"""``python -m bench.family.report FILE``: the section of docs/family.md from a result file. ``--check``: is it up to date?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from bench.family.bars import as_table
from bench.family.methods import METHODS
from bench.family.tables import CELLS, HEADINGS, cases, heading
from bench.report import ROOT, rewrite

__all__ = ["section"]


def section(result: dict[str, Any]) -> str:
    """Markdown: the figures to reach, a table a case, and where it was measured."""
    lines = list(as_table(result["rows"]))
    for case, rows in cases(result["rows"]).items():
        lines += ["", f"**{heading(case)}**", "", f"| {' | '.join(HEADINGS)} |", "|---" + "|---:" * (len(HEADINGS) - 1) + "|"]
        lines += [f"| {' | '.join(cell(row) for cell in CELLS)} |" for row in rows]
    measured = {row["method"] for row in result["rows"]}
    notes = {provider.note: method.title for method in METHODS.values() if method.name in measured for provider in method.providers}
    lines += [f"\n{title}: pytorch_optimizer {note}." for note, title in notes.items() if note]
    where = f"{result['cpu']}, {result['threads']} threads, {result['instruction_set']}, torch {result['torch']}, commit {result['commit']}"
    return "\n".join([*lines, "", f"{where}; allocator: {result['allocator']}; load when it began: {result['load_1min']}."])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--docs", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "docs/family.md", help="Default: docs/family.md.")
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 where the file would change.")
def main(file: Path, docs: Path, check: bool) -> None:
    """Regenerates the section between the markers from FILE."""
    rewrite(docs, section(json.loads(file.read_text())), check=check)


if __name__ == "__main__":
    main(prog_name="python -m bench.family.report")
