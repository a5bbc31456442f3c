"""``python -m bench.importance.report FILE``: the section of docs/sampling.md from a result file. ``--check``: is it up to date?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from bench.importance.problem import PROBLEMS
from bench.importance.run import WAYS
from bench.report import ROOT, replace_section

__all__ = ["ROOT", "faster", "section"]


def faster(rows: list[dict[str, Any]], row: dict[str, Any]) -> float:
    """How many times the steps uniform sampling needs for the same decay, with the same λ."""
    uniform = next(other for other in rows if other["way"] == "uniform" and other["lambd"] == row["lambd"])
    return float(row["rate_measured"] / uniform["rate_measured"])


def section(result: dict[str, Any]) -> str:
    """Markdown: a table for each problem, and how it was measured."""
    parts = []
    for problem in result["problems"]:
        parts.append(
            f"**{PROBLEMS[problem['problem']]}**: L_max {problem['L_max']:.4g}, L_avg {problem['L_avg']:.4g}, "
            f"L_min {problem['L_min']:.4g}, μ {problem['mu']:.3g}."
        )
        lines = [
            "| λ | sampling | ρ | γ | bound: γμ | measured rate | over uniform | floor: bound | measured |",
            "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for row in sorted(problem["rows"], key=lambda row: row["lambd"]):
            floor = "not reached" if row["floor_measured"] is None else f"{row['floor_measured']:.2g}"
            cells = [
                f"{row['lambd']:g}",
                WAYS[row["way"]],
                *(f"{row[key]:.2g}" for key in ("rho", "gamma", "rate_predicted", "rate_measured")),
                f"{faster(problem['rows'], row):.1f}×",
                f"{row['floor_predicted']:.2g}",
                floor,
            ]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    parts.append(f"{result['steps']:,} steps, mean of {result['seeds']} seeds, float64; commit {result['commit']}.")
    return "\n\n".join(parts)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--docs", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "docs/sampling.md", help="Default: docs/sampling.md."
)
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 where the file would change.")
def main(file: Path, docs: Path, check: bool) -> None:
    """Regenerates the section between the markers from FILE."""
    text = docs.read_text()
    wanted = replace_section(text, section(json.loads(file.read_text())), docs.name)
    if check and text != wanted:
        click.echo(f"out of date: {docs.name}")
        raise SystemExit(1)
    if not check:
        docs.write_text(wanted)


if __name__ == "__main__":
    main(prog_name="python -m bench.importance.report")
