"""``python -m bench.training.report FILE``: tables and chart of docs/training_cost.md from a result file. ``--check``: are they up to date?

``--numbers PAGE`` writes four figures (gain, training step, optimizer step, memory) between the markers of a page, for example README.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from bench import options
from bench.page import ROOT, count, page_options, replace_between, rewrite, table, where
from bench.training.chart import draw
from bench.training.models import MODELS
from bench.training.numbers import BEGIN, END, SHOWN, lines
from bench.training.tables import HEADINGS, by_model, cells, regime_cells

__all__ = ["main", "section"]

IMAGE = ROOT / "docs" / "images" / "training.png"
CAPTION = (
    "A training step over one of the base optimizer in the same round, median; error bars: 20th to 80th percentile of the rounds. "
    "Dark: the part outside forward and backward passes."
)


def section(result: dict[str, Any], image: str) -> str:
    """Return Markdown: the chart, a table for each model, the regime map, and where they were measured."""
    parts = [f"![Time of a training step over the base optimizer's, by model and implementation]({image})\n\n{CAPTION}"]
    for model, rows in by_model(result["rows"]).items():
        row = next(iter(rows.values()))
        size = f"{row['n_tensors']:,} tensors, {row['numel']:,} trained elements"
        parts.append(
            f"**{MODELS[model].title}** ({size}; {count(row['rounds'], 'round')})\n\n{table(HEADINGS, cells(result['rows'], model))}"
        )
    headings, lines_of_map = regime_cells(result["rows"])
    if lines_of_map:
        note = (
            "Share of the optimizer in a step of the usual loop → in a step of `sam_kernels`, and the part of the usual loop's step that "
            "this saves (below 0: that it adds)."
        )
        parts.append(f"**Where it matters.** {note}\n\n{table(headings, lines_of_map)}")
    quick = " A run with `--quick`: small models, two rounds." if result["quick"] else ""
    peers = ", ".join(f"{name} {version}" for name, version in result["peers"].items() if name == "pytorch_optimizer")
    measured = f"{where(result)}{f'; {peers}' if peers else ''}"
    return "\n\n".join([*parts, f"`{result['command']}`. {measured}. Load when it began: {result['load_1min']:g}.{quick}"])


@page_options("training_cost.md")
@click.option("--image", type=options.FILE(), default=IMAGE, help="The chart. Default: docs/images/training.png.")
@click.option("--numbers", type=options.FILE(exists=True), help="A page with markers for the four figures, for example README.md.")
@click.option(
    "--steps",
    type=options.FILE(exists=True),
    help="Result of `python -m bench` with the optimizer step. Default: optimizer.json beside it.",
)
@click.option("--gain", type=options.FILE(exists=True), help="Result of `python -m bench.dial`. Default: dial.json beside FILE.")
def main(file: Path, docs: Path, check: bool, image: Path, numbers: Path | None, steps: Path | None, gain: Path | None) -> None:
    """Regenerates the section between the markers of docs/training_cost.md, and the chart, from FILE."""
    result = json.loads(file.read_text())
    if not check:
        draw(result, image)
    elif not image.exists():  # its pixels depend on matplotlib's version
        click.echo(f"missing: {image.name}")
        raise SystemExit(1)
    rewrite(docs, section(result, Path(os.path.relpath(image, docs.parent)).as_posix()), check=check)
    if numbers is not None:
        is_shown = not {row["model"] for row in result["rows"]}.isdisjoint(SHOWN)
        short = image.with_name(f"{image.stem}_short{image.suffix}") if is_shown else None
        if short is not None and not check:
            draw(result, short, SHOWN)
        beside = (steps or file.with_name("optimizer.json"), gain or file.with_name("dial.json"))
        shown = lines(result, *(json.loads(path.read_text()) if path.exists() else None for path in beside))
        _write_numbers(numbers, shown, short, check=check)


def _write_numbers(page: Path, shown: list[str], image: Path | None, *, check: bool) -> None:
    text = page.read_text()
    if image is not None:
        link = Path(os.path.relpath(image, page.parent)).as_posix()
        shown += ["", f"![Time of a training step over that of the base optimizer]({link})"]
    wanted = replace_between(text, "\n".join(shown), page.name, BEGIN, END)
    if not check:
        page.write_text(wanted)
    elif wanted != text:
        click.echo(f"out of date: {page.name}")
        raise SystemExit(1)


if __name__ == "__main__":
    main(prog_name="python -m bench.training.report")
