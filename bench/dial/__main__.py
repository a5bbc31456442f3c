"""``python -m bench.dial``: what cheaper variants of SAM cost, and what share of its gain they keep, so that 2x or 1x can be chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from bench import gate, options
from bench.command import RESULTS, begin
from bench.dial import accuracy, cost
from bench.dial.chart import draw
from bench.dial.methods import BASE, METHODS, SAM
from bench.dial.report import section
from bench.dial.stored import Stored
from bench.dial.tasks import TASKS, Task
from bench.environment import environment

__all__ = ["main"]

TESTS = tuple(f"tests/optim/test_{name}.py" for name in ("formula", "family", "plain_steps", "freezing", "rwsam", "micro_batches"))
STAGES = ("cost", "accuracy")


@options.command
@options.names("--stages", known=STAGES, help="Stages; accuracy needs the costs, of this call or of the file.")
@options.names("--tasks", known=TASKS, help="Tasks.")
@options.names("--methods", known=METHODS, help="Methods; base and sam always take part.")
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Reported runs of each method: seeds 0, 1, …")
@click.option("--rounds", type=click.IntRange(min=1), default=45, show_default=True, help="Blocks of steps of each method, for the cost.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of torch.")
@click.option("--quick", is_flag=True, help="Tiny tasks, one radius, two seeds: does everything run? Its numbers are not for the page.")
@options.gate("Run the tests of the optimizers first.")
@click.option("--out", type=options.FILE(), default=Path("out/dial.json"), show_default=True, help="Result file; goes on from what it has.")
@options.store("dial", " in the place of --out")
@click.option("--image", type=options.FILE(), help="Where to draw the figure.")
def main(
    stages: Sequence[str],
    tasks: Sequence[str],
    methods: Sequence[str],
    seeds: int,
    rounds: int,
    threads: int,
    quick: bool,
    with_gate: bool,
    out: Path,
    store: bool,
    image: Path | None,
) -> None:
    """Cost over the base and share of SAM's gain of what is cheaper than SAM, at equal epochs and at equal time."""
    if quick and store:
        raise click.UsageError("--quick is not stored")
    console = begin(threads)
    chosen = {name: _tiny(TASKS[name]) if quick else TASKS[name] for name in tasks}
    names = [name for name in METHODS if name in (BASE, SAM, *methods)]
    where = environment() | {"gate": gate.run(tests=TESTS) if with_gate else "skipped"}
    stored = Stored(RESULTS / where["device"] / "dial.json" if store else out, where, chosen, quick=quick)
    if "cost" in stages:
        _measure_costs(stored, chosen, names, where, rounds=1 if quick else rounds, block=10 if quick else cost.BLOCK, console=console)
    if "accuracy" in stages:
        _measure_accuracy(stored, chosen, names, where, seeds=2 if quick else seeds, tries=1 if quick else accuracy.TRIES, console=console)
    if "accuracy" not in stages:
        for line in cost.bar(stored.result["cost"]):
            console.print(line, highlight=False)
        return
    console.print(Markdown(section(stored.result)))
    if image is not None:
        draw(stored.result, image)


def _tiny(task: Task) -> Task:
    return replace(task, epochs=2, samples=4 * task.batch_size)


def _measure_costs(
    stored: Stored, tasks: dict[str, Task], names: Sequence[str], where: dict[str, object], *, rounds: int, block: int, console: Console
) -> None:
    for name, task in tasks.items():
        rows = cost.measure(name, task, names, rounds=rounds, block=block)
        stored.result["stages"]["cost"] = where
        stored.replace("cost", rows)
        shown = ", ".join(f"{row['method']} {row['of_base'][1]:.2f}" for row in rows)
        console.print(f"{name}: cost over base: {shown}", highlight=False)


def _measure_accuracy(
    stored: Stored, tasks: dict[str, Task], names: Sequence[str], where: dict[str, object], *, seeds: int, tries: int, console: Console
) -> None:
    for name in tasks:
        if missing := [method for method in names if method not in stored.costs(name)]:
            raise click.ClickException(f"{name}: no cost is stored of {', '.join(missing)}: run --stages cost first")
    stored.result["stages"]["accuracy"] = where
    columns = (TextColumn("{task.description}"), TextColumn("{task.completed} runs"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("", total=None)

        def save(line: str) -> None:
            stored.write()
            progress.update(bar, description=line, advance=1)
            if not console.is_terminal:
                console.print(line, highlight=False, soft_wrap=True)

        for name, task in tasks.items():
            runner = accuracy.Runner(name, task, stored.result["runs"], save, str(where["commit"]))
            tuning = accuracy.TUNING_SEEDS[: min(tries, len(accuracy.TUNING_SEEDS))]
            stored.replace("accuracy", accuracy.measure(runner, names, stored.costs(name), seeds=seeds, tuning=tuning, tries=tries))


if __name__ == "__main__":
    main(prog_name="python -m bench.dial")
