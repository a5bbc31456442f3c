"""A comparison: every optimizer with every seed, under a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from sam_kernels.cli.train.data import Digits
from sam_kernels.cli.train.optimizers import Settings
from sam_kernels.cli.train.run import Plan, Run, run
from sam_kernels.cli.train.sharpness import sharpness_of

__all__ = ["Comparison"]


@dataclass(frozen=True)
class Comparison:
    """The options of one command, checked."""

    data: str  # the name of the data set
    names: Sequence[str]  # of the optimizers
    settings: Settings
    plan: Plan
    held_out: bool  # scores are of held-out training images
    sharpness: bool  # measured at the end of each run
    seeds: int  # runs of each optimizer
    backend: str
    device: str
    threads: int

    @property
    def title(self) -> str:
        """Of the table and of the curves."""
        network = {"batch": "", "group": ", GroupNorm", "none": ", no normalization"}[self.plan.normalization]
        noise = f", {self.plan.label_noise:.0%} of the training labels wrong" if self.plan.label_noise else ""
        scored = "accuracy on held-out training images" if self.held_out else "test accuracy"
        epochs = f"{self.plan.epochs} epoch{'' if self.plan.epochs == 1 else 's'}"
        return f"{self.data}, {self.settings.base}, {epochs}{network}{noise}: {scored}"

    def run(self, digits: Digits, console: Console) -> list[Run]:
        """Return the runs, grouped by optimizer. Without a terminal the console shows a line a run and no bar."""
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
            task = progress.add_task("", total=len(self.names) * self.seeds * self.plan.epochs)
            for name in self.names:
                for seed in range(self.seeds):
                    progress.update(task, description=f"{name}, seed {seed}")
                    result = self._run(name, seed, digits, lambda: progress.advance(task))
                    runs.append(result)
                    console.print(
                        f"{name}, seed {seed}: accuracy {result.test_accuracy[-1]:.2%} after {result.seconds:.1f} s of steps",
                        highlight=False,
                    )
        return runs

    def _run(self, name: str, seed: int, digits: Digits, advance: Callable[[], None]) -> Run:
        measured: list[tuple[float, float]] = []

        def finished(model: nn.Module, labels: Tensor) -> None:
            if self.sharpness:
                measured.append(sharpness_of(model, digits.train_images, labels))

        result = run(name, seed, digits, self.settings, self.plan, advance=advance, finished=finished)
        if measured:
            result.top_eigenvalue, result.hessian_trace = measured[0]
        return result
