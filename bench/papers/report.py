"""``python -m bench.papers.report FILE``: the tables of docs/papers.md from a result file. ``--check``: are they up to date?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from bench.machine_code.generated import between_markers, write
from bench.page import page_options, table
from bench.papers.experiments import EXPERIMENTS

__all__ = ["main", "section"]


def section(name: str, entry: dict[str, Any]) -> str:
    """Markdown: the table of one experiment, and what it was measured with."""
    experiment = EXPERIMENTS[name]
    lines = table([column.heading for column in experiment.columns], map(experiment.cells, entry["rows"]), "l")
    changed = " with local changes" if entry["dirty"] else ""
    return "\n".join([lines, "", f"`python -m bench.papers {name}`, commit {entry['commit']}{changed}."])


@page_options("papers.md")
def main(file: Path, docs: Path, check: bool) -> None:
    """Regenerates what stands between the markers of each experiment from FILE."""
    entries = json.loads(file.read_text())["experiments"]
    for name, entry in entries.items():
        wanted = section(name, entry)
        if not check:
            write(docs, name, wanted)
        elif between_markers(docs.read_text(encoding="utf-8"), name) != wanted + "\n":
            click.echo(f"out of date: {docs.name}, {name}")
            raise SystemExit(1)


if __name__ == "__main__":
    main(prog_name="python -m bench.papers.report")
