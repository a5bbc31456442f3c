"""``python -m bench.importance``: importance against uniform sampling on ridge regression, at the steps that theory gives."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress, TaskID

from bench import gate, options
from bench.batched import times_of
from bench.command import write
from bench.environment import environment
from bench.importance.chart import draw
from bench.importance.problem import PROBLEMS, make_problem
from bench.importance.report import section
from bench.importance.run import measure
from bench.page import ROOT

__all__ = ["main"]

TESTS = ("tests/test_theory.py", "tests/sampling")


@options.command
@click.option("--steps", type=click.IntRange(min=1), default=1_000_000, show_default=True, help="Of every run.")
@click.option("--points", type=click.IntRange(min=1), default=200, show_default=True, help="Of every curve.")
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Runs whose mean is taken.")
@options.gate("Run the tests of the theory and of the samplers first.")
@options.JSON
@click.option("--image", type=options.FILE(), help="Where to draw the curves.")
@options.store("importance", " and docs/images/importance.png")
def main(steps: int, points: int, seeds: int, with_gate: bool, json_path: Path | None, image: Path | None, store: bool) -> None:
    """Single-element sampling of Unified SAM, λ 0, 0.5 and 1, on two ridge problems: rates and floors against the bounds."""
    torch.set_num_threads(1)  # a step is a hundred numbers a run
    passed = gate.run(tests=TESTS) if with_gate else "skipped"
    result: dict[str, Any] = environment() | {"gate": passed, "steps": steps, "seeds": seeds, "problems": []}
    with Progress(disable=not os.isatty(1), transient=True) as progress:
        for name in PROBLEMS:
            problem, bar = make_problem(name), progress.add_task(name, total=steps)
            times, advance = times_of(steps, points, first=max(1, steps // 1000)), partial(_advance, progress, bar)
            smoothness = problem.smoothness
            result["problems"].append(
                {
                    "problem": name,
                    "mu": problem.mu,
                    "L_max": smoothness.max().item(),
                    "L_avg": smoothness.mean().item(),
                    "L_min": smoothness.min().item(),
                    "f_inf": problem.f_inf,
                    "times": times,
                    "rows": measure(problem, times, seeds, advance),
                }
            )
    Console(width=None if os.isatty(1) else 150).print(Markdown(section(result)))
    write(result, json_path, "importance" if store else None, indent=None)
    for path in [path for path in (image, ROOT / "docs/images/importance.png" if store else None) if path is not None]:
        draw(result, path)


def _advance(progress: Progress, bar: TaskID, t: int) -> None:
    progress.update(bar, completed=t)


if __name__ == "__main__":
    main(prog_name="python -m bench.importance")
