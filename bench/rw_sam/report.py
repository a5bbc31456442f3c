"""``python -m bench.rw_sam.report FILE``: the section of docs/rw_sam.md from a result file. ``--check``: is it up to date?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from bench.per_sample.bars import as_table
from bench.per_sample.models import MODELS
from bench.report import ROOT, rewrite
from bench.rw_sam import quality
from bench.rw_sam.bars import BARS, over_sam
from bench.rw_sam.providers import PROVIDERS

__all__ = ["section"]


def section(result: dict[str, Any]) -> str:
    """Markdown: the steps, the rank correlations, the figures to reach, and where they were measured."""
    steps, found = ([row for row in result["rows"] if row["kind"] == kind] for kind in ("rw_sam", "quality"))
    lines = ["| model | a whole step of | ms (20 / 50 / 80 %) | over SAM in the same round |", "|---|---|---:|---:|"]
    for row in steps:
        times = " / ".join(f"{row[key]:.1f}" for key in ("ms_20", "ms_50", "ms_80"))
        lines.append(f"| {MODELS[row['model']].title} | {PROVIDERS[row['provider']].title} | {times} | {over_sam(row)} |")
    lines += ["", "| model | norms | rank correlation with the true norms | over draws |", "|---|---|---:|---:|"]
    for row in found:
        spread = f"{row['least']:.3f} – {row['greatest']:.3f} ({row['draws']})" if row["draws"] > 1 else ""
        titles = f"{quality.MODELS[row['model']].title} | {quality.ESTIMATES[row['provider']].title}"
        lines.append(f"| {titles} | {row['rank_correlation']:.4f} | {spread} |")
    where = f"{result['cpu']}, {result['threads']} threads, {result['instruction_set']}, torch {result['torch']}, commit {result['commit']}"
    return "\n".join([*lines, "", *as_table(result["rows"], BARS), "", f"{where}; allocator: {result['allocator']}."])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--docs", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "docs/rw_sam.md", help="Default: docs/rw_sam.md.")
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 where the file would change.")
def main(file: Path, docs: Path, check: bool) -> None:
    """Regenerates the section between the markers from FILE."""
    rewrite(docs, section(json.loads(file.read_text())), check=check)


if __name__ == "__main__":
    main(prog_name="python -m bench.rw_sam.report")
