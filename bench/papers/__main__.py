"""``python -m bench.papers [NAMES]``: the papers' experiments, driven by the library's optimizers, with figures, CSV and one JSON."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from bench import gate, options
from bench.command import RESULTS, begin, write
from bench.environment import environment
from bench.papers.context import Context
from bench.papers.experiment import Experiment, Measured
from bench.papers.experiments import EXPERIMENTS

__all__ = ["main"]

TESTS = (
    "tests/test_theory.py",
    "tests/test_theory_reshuffling.py",
    "tests/sampling",
    "tests/optim/test_formula.py",
    "tests/optim/test_micro_batches.py",
)
IMAGES = gate.ROOT / "docs" / "images"


@options.command
@click.argument("names", nargs=-1, type=click.Choice(list(EXPERIMENTS)))
@click.option("--quick", is_flag=True, help="A subset of seconds, to see that everything runs: its numbers are not for the page.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Of torch and of the linear algebra; little gains from more.",
)
@options.gate("Run the tests of the optimizers, the theory and the samplers first.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out"), show_default=True, help="Folder for figures and CSV."
)
@options.JSON
@click.option(
    "--store", is_flag=True, help="Replace what is stored of NAMES: docs/images/papers_<name>.png, bench/results/<device>/papers*."
)
def main(names: tuple[str, ...], quick: bool, threads: int, with_gate: bool, out: Path, json_path: Path | None, store: bool) -> None:
    """The papers' experiments, in minutes. NAMES: which of them; all, if none is given. docs/papers.md shows what is stored."""
    if quick and store:
        raise click.UsageError("--quick is not stored")
    console = begin(threads)
    result: dict[str, Any] = environment() | {"gate": gate.run(tests=TESTS) if with_gate else "skipped", "experiments": {}}
    console.print(f"gate {result['gate']}", highlight=False, soft_wrap=True)
    stored = RESULTS / result["device"]
    images, tables = (IMAGES, stored) if store else (out, out)
    context = Context(quick, console)
    for name in names or EXPERIMENTS:
        start = time.perf_counter()
        with threadpool_limits(threads):
            measured = EXPERIMENTS[name].measure(context)
        seconds = round(time.perf_counter() - start, 1)
        _print(EXPERIMENTS[name], measured, console, seconds)
        _save(name, measured, images, tables)
        # Of its own: others may have been stored before.
        where = {key: result[key] for key in ("date", "commit", "dirty", "load_1min", "gate")}
        result["experiments"][name] = where | {"seconds": seconds, "quick": quick, "settings": measured.settings, "rows": measured.rows}
    if store and (stored / "papers.json").exists():
        before = json.loads((stored / "papers.json").read_text())["experiments"]
        result["experiments"] = {
            name: (before | result["experiments"])[name] for name in EXPERIMENTS if name in before | result["experiments"]
        }
    write(result, json_path, "papers" if store else None)


def _print(experiment: Experiment, measured: Measured, console: Console, seconds: float) -> None:
    table = Table(*(column.heading for column in experiment.columns), title=f"{experiment.title} ({seconds} s)")
    for row in measured.rows:
        table.add_row(*experiment.cells(row))
    console.print(table)


def _save(name: str, measured: Measured, images: Path, tables: Path) -> None:
    for folder in (images, tables):
        folder.mkdir(parents=True, exist_ok=True)
    figure = EXPERIMENTS[name].draw(measured)
    figure.savefig(images / f"papers_{name}.png", dpi=100, metadata={"Software": None})
    with (tables / f"papers_{name}.csv").open("w", newline="") as file:
        lines = csv.DictWriter(file, list(measured.points[0]), lineterminator=os.linesep)
        lines.writeheader()
        lines.writerows(measured.points)


if __name__ == "__main__":
    main(prog_name="python -m bench.papers")
