"""``python -m bench.per_sample.report FILE``: the section of docs/per_sample.md from a result file. ``--check``: is it up to date?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from bench.per_sample.bars import as_table
from bench.per_sample.models import MODELS
from bench.per_sample.providers import PROVIDERS
from bench.report import ROOT, rewrite

__all__ = ["section"]


def section(result: dict[str, Any]) -> str:
    """Markdown: the passes, the figures to reach, and where they were measured."""
    rows = result["rows"]
    plain = {row["model"]: row["ms_50"] for row in rows if row["provider"] == "plain"}
    lines = ["| pass | who | ms (20 / 50 / 80 %) | over a plain pass | memory beyond a plain pass |", "|---|---|---:|---:|---:|"]
    for row in rows:
        memory = f"{row['extra_bytes'] / 2**20:.0f} MiB" if "extra_bytes" in row and row["provider"] != "plain" else ""
        times = " / ".join(f"{row[key]:.1f}" for key in ("ms_20", "ms_50", "ms_80"))
        ratio = f"{row['ms_50'] / plain[row['model']]:.2f}" if row["model"] in plain else ""
        lines.append(f"| {MODELS[row['model']].title} | {PROVIDERS[row['provider']].title} | {times} | {ratio} | {memory} |")
    where = f"{result['cpu']}, {result['threads']} threads, {result['instruction_set']}, torch {result['torch']}, commit {result['commit']}"
    return "\n".join([*lines, "", *as_table(rows), "", f"{where}; allocator: {result['allocator']}."])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--docs", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "docs/per_sample.md", help="Default: docs/per_sample.md."
)
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 where the file would change.")
def main(file: Path, docs: Path, check: bool) -> None:
    """Regenerates the section between the markers from FILE."""
    rewrite(docs, section(json.loads(file.read_text())), check=check)


if __name__ == "__main__":
    main(prog_name="python -m bench.per_sample.report")
