"""``python -m bench.dial.report FILE``: tables and figure of docs/dial.md from a result file. ``--check``: are the tables up to date?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from bench import options
from bench.dial.chart import draw
from bench.dial.cost import bar
from bench.dial.methods import METHODS, SAM
from bench.dial.results import PROTOCOLS, Results
from bench.dial.tasks import TASKS
from bench.page import ROOT, count, page_options, rewrite, table
from sam_kernels.cli.train.report import Estimate

__all__ = ["main", "section"]

IMAGE = ROOT / "docs" / "images" / "dial.png"


def section(result: dict[str, Any]) -> str:
    """Return Markdown: shares of SAM's gain, the figure, a table for each task, radii and epochs, and where it was measured."""
    found = Results(result)
    parts = [
        "Share of SAM's gain over the base that is kept, at equal epochs. Cost: a whole training step over one of the base, lowest to "
        "highest of the tasks. –: SAM's own gain is less than two standard errors.",
        _shares(found),
        "![Gain over the base by cost](images/dial.png)",
        *(part for name in found.tasks for part in _task(found, name)),
        "**Radii and epochs.** ρ, chosen on held-out data at equal epochs, and the epochs at equal time. "
        "†: the largest or smallest that was tried.",
        _radii(found),
        *(f"* {line}" for line in bar(result["cost"])),
        _where(result),
    ]
    return "\n\n".join(parts).replace("\n\n* ", "\n* ")


def _shares(found: Results) -> str:
    rows = []
    for method in found.methods:
        costs = [found.cost(name, method)[1] for name in found.tasks]
        shown = f"{min(costs):.2f} – {max(costs):.2f}" if len(costs) > 1 else f"{costs[0]:.2f}"
        rows.append([METHODS[method].title, shown, *(_percent(found.share(name, method, "equal_epochs")) for name in found.tasks)])
    return table(["", "cost, × base", *(f"{TASKS[name].title}, %" for name in found.tasks)], rows)


def _task(found: Results, name: str) -> tuple[str, str]:
    task, rows = TASKS[name], []
    for method in found.methods:
        low, middle, high = found.cost(name, method)
        cells = [METHODS[method].title, f"{middle:.2f} ({low:.2f} – {high:.2f})"]
        for protocol in PROTOCOLS:
            cells += [found.score(name, method, protocol).text(task.decimals), _percent(found.share(name, method, protocol))]
        rows.append(cells)
    gains = (f"{found.gain(name, SAM, protocol).text(task.decimals)} at {title}" for protocol, title in PROTOCOLS.items())
    heading = (
        f"**{task.title}**: {task.metric}, {'more' if task.sign > 0 else 'less'} is better. SAM's gain over the base: {', '.join(gains)}."
    )
    columns = [column for title in PROTOCOLS.values() for column in (title, "kept, %")]
    return heading, table(["", "cost, × base (20 – 80 %)", *columns], rows)


def _radii(found: Results) -> str:
    rows = []
    for method in found.methods:
        cells = [METHODS[method].title]
        for name in found.tasks:
            row = found.row(name, method)
            cells.append(f"{_radius(row)}{count(row['epochs']['equal_time'], 'epoch')}")
        rows.append(cells)
    return table(["", *(TASKS[name].title for name in found.tasks)], rows)


def _radius(row: dict[str, Any]) -> str:
    """Return the radius, marked where none was tried on one side of it."""
    if row["rho"] is None:
        return ""
    tried = [rho for rho, _ in row["tried"]]
    return f"ρ = {row['rho']:g}{'' if min(tried) < row['rho'] < max(tried) else ' †'}, "


def _percent(share: Estimate | None) -> str:
    return "–" if share is None else share.text(0, 100)


def _where(result: dict[str, Any]) -> str:
    cost = result["stages"]["cost"]
    commits = sorted({run["commit"] for run in result["runs"]})
    seeds = len(result["accuracy"][0]["scores"]["equal_epochs"])
    rounds, block = result["cost"][0]["rounds"], result["cost"][0]["block"]
    sentences = (
        f"Means of {count(seeds, 'seed')} and their standard errors; shares are from pairs of equal seeds.",
        f"Costs: medians of {count(rounds, 'round')} of {count(block, 'step')}, 20th to 80th percentile in brackets.",
        f"Load when they began: {cost['load_1min']:g}.",
        f"{cost['cpu']}, {count(cost['threads'], 'thread')}, {cost['instruction_set']}, torch {cost['torch']}, Python {cost['python']};",
        f"commit {cost['commit']} (cost), {', '.join(commits)} (accuracy).",
    )
    return " ".join(sentences)


@page_options("dial.md")
@click.option("--image", type=options.FILE(), default=IMAGE, help="Default: docs/images/dial.png.")
def main(file: Path, docs: Path, check: bool, image: Path) -> None:
    """Regenerates the section between the markers from FILE, and the figure."""
    result = json.loads(file.read_text())
    rewrite(docs, section(result), check=check)
    if not check:
        draw(result, image)


if __name__ == "__main__":
    main(prog_name="python -m bench.dial.report")
