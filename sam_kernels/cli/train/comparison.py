"""Every optimizer with every seed, under a progress bar."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sam_kernels.cli.train.data import Digits
from sam_kernels.cli.train.optimizers import Settings
from sam_kernels.cli.train.run import Plan, Run, run

__all__ = ["compare"]


def compare(
    names: Sequence[str],
    seeds: int,
    data: Digits,
    settings: Settings,
    plan: Plan,
    console: Console,
) -> list[Run]:
    """Runs grouped by optimizer. Without a terminal there is a line a run and no bar."""
    runs = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=len(names) * seeds * plan.epochs)
        for name in names:
            for seed in range(seeds):
                progress.update(task, description=f"{name}, seed {seed}")
                result = run(name, seed, data, settings, plan, advance=lambda: progress.advance(task))
                runs.append(result)
                console.print(
                    f"{name}, seed {seed}: accuracy {result.test_accuracy[-1]:.2%} after {result.seconds:.1f} s of steps",
                    highlight=False,
                )
    return runs
