"""A comparison: every optimizer with every seed, under a progress bar."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from sam_kernels.cli.output import Ticker
from sam_kernels.cli.train.data import Digits
from sam_kernels.cli.train.optimizers import Settings
from sam_kernels.cli.train.plan import Plan
from sam_kernels.cli.train.run import Run, run
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

    @property
    def planned(self) -> int:
        """Runs of all optimizers with all seeds."""
        return len(self.names) * self.seeds

    def run(self, digits: Digits, console: Console) -> Iterator[Run]:
        """Yield the runs as they finish, grouped by optimizer. Without a terminal the console shows no bar, but a line at the end of each
        run, and one after an epoch where the last line is ten seconds old."""
        ticker, epochs = Ticker(console), self.plan.epochs
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
            task = progress.add_task("", total=self.planned * epochs)
            for run_index, (name, seed) in enumerate(itertools.product(self.names, range(self.seeds))):
                progress.update(task, description=f"{name}, seed {seed}")
                finished = itertools.count(1)
                start = f"{name}, seed {seed}, run {run_index + 1} of {self.planned}"
                result = self._run(name, seed, digits, partial(self._advance, progress, task, ticker, finished, start))
                yield result
                accuracy = "diverged" if result.diverged else f"accuracy {result.test_accuracy[-1]:.2%}"
                ticker.say(f"{name}, seed {seed}: {accuracy} after {result.seconds:.1f} s of steps")

    def _advance(self, progress: Progress, task: TaskID, ticker: Ticker, finished: Iterator[int], start: str) -> None:
        progress.advance(task)
        epoch = next(finished)
        if epoch < self.plan.epochs:  # the end of a run has a line of its own
            ticker.tick(f"{start}: epoch {epoch} of {self.plan.epochs}")

    def _run(self, name: str, seed: int, digits: Digits, advance: Callable[[], None]) -> Run:
        measured: list[tuple[float, float]] = []

        def finished(model: nn.Module, labels: Tensor) -> None:
            if self.sharpness:
                measured.append(sharpness_of(model, digits.train_images, labels))

        result = run(name, seed, digits, self.settings, self.plan, advance=advance, finished=finished)
        if measured:
            result.top_eigenvalue, result.hessian_trace = measured[0]
        return result
