"""The results of a comparison: means over the seeds with their standard errors, as tables and as JSON."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.console import Group
from rich.table import Table

import sam_kernels
from sam_kernels.cli import output
from sam_kernels.cli.train.comparison import Comparison
from sam_kernels.cli.train.optimizers import Settings, options_of
from sam_kernels.cli.train.plan import SHARPNESS_IMAGES
from sam_kernels.cli.train.run import Run

__all__ = ["SHOWN", "Estimate", "Summary", "advice", "summaries_of", "summarise", "tables", "to_json"]

TIMES = ("seconds_per_step", "forward_seconds", "backward_seconds", "rest_seconds")  # of a run and of a summary
SHARPNESS = ("top_eigenvalue", "hessian_trace")  # of both
SHOWN = {
    "rho": "rho {:g}",
    "lambd": "lambda {}",
    "micro_batch_size": "m {}",
    "beta": "beta {:g}",
    "beta_scale": "of {}",
    "norm_cap": "norms cut at {:g} medians",
    "norms": "{}",
    "micro_batch": "m {}",
    "num_directions": "K {}",
    "theta": "theta {:g}",
    "alpha": "alpha {:g}",
    "kappa": "kappa {:g}",
    "k": "k {}",
}


@dataclass(frozen=True)
class Estimate:
    mean: float
    standard_error: float | None  # None: one seed says nothing about it
    interval: tuple[float, float] | None = None  # of the one proportion that the mean is of: 95 %, over the images that were scored

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        if len(values) < 2 or not all(map(math.isfinite, values)):
            return cls(statistics.fmean(values), None)
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))

    @classmethod
    def of_proportions(cls, values: Sequence[float], count: int) -> Estimate:
        """As :meth:`of`; a single value is a proportion of ``count`` images, and has Wilson's interval."""
        found = cls.of(values)
        if len(values) > 1 or count == 0:
            return found
        from scipy.stats import binomtest

        wilson = binomtest(round(values[0] * count), count).proportion_ci(0.95, method="wilson")
        return cls(found.mean, None, (float(wilson.low), float(wilson.high)))

    def text(self, decimals: int, factor: float = 1.0) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error * factor:.{decimals}f}"
        if self.interval is not None:
            low, high = (end * factor for end in self.interval)
            error = f" ({low:.{decimals}f} to {high:.{decimals}f})"
        return f"{output.rounded(self.mean * factor, decimals):.{decimals}f}{error}"


@dataclass(frozen=True)
class Summary:
    optimizer: str
    options: Mapping[str, Any]  # what the optimizer was run with beyond its base's
    runs: int  # finished
    diverged: int  # of them
    test_accuracy: Estimate  # after the last epoch
    best_test_accuracy: Estimate  # of each run's best epoch, which is chosen by looking at the test set: too good
    train_loss: Estimate  # mean of the last epoch
    seconds_per_step: float  # means, as a run has them: forward, backward and rest add up to it
    forward_seconds: float
    backward_seconds: float
    rest_seconds: float
    optimizer_share: float
    top_eigenvalue: Estimate | None = None  # of the Hessian of the training loss; None: not measured
    hessian_trace: Estimate | None = None


def summarise(runs: Sequence[Run], options: Mapping[str, Any]) -> Summary:
    times: dict[str, Any] = {name: statistics.fmean(getattr(run, name) for run in runs) for name in TIMES}
    return Summary(
        runs[0].optimizer,
        options,
        len(runs),
        sum(run.diverged for run in runs),
        Estimate.of_proportions([run.test_accuracy[-1] for run in runs], runs[0].scored_images),
        Estimate.of([max(run.test_accuracy) for run in runs]),
        Estimate.of([run.train_loss[-1] for run in runs]),
        **times,
        optimizer_share=times["rest_seconds"] / (times["seconds_per_step"] or math.nan),
        top_eigenvalue=_measured([run.top_eigenvalue for run in runs]),
        hessian_trace=_measured([run.hessian_trace for run in runs]),
    )


def _measured(values: Sequence[float | None]) -> Estimate | None:
    """None where no run, or not each, has been measured."""
    found = [value for value in values if value is not None]
    return Estimate.of(found) if len(found) == len(values) else None


def summaries_of(runs: Sequence[Run], settings: Settings) -> list[Summary]:
    """Return a summary for each optimizer, in the order of its first run."""
    names = dict.fromkeys(run.optimizer for run in runs)
    return [summarise([run for run in runs if run.optimizer == name], options_of(name, settings)) for name in names]


def advice(comparison: Comparison, runs: Sequence[Run]) -> list[str]:
    """Return a line for each run that has diverged: the evidence, and the options to change."""
    lines = []
    for run in runs:
        if run.diverged:
            finite = all(map(math.isfinite, run.train_loss))
            loss = f"its loss rose from {run.first_loss:.3g} to {run.train_loss[-1]:.3g}, its accuracy is at chance"
            has_radius = "rho" in options_of(run.optimizer, comparison.settings)
            options = "--lr or --rho" if has_radius else "--lr"
            lines.append(
                f"{run.optimizer}, seed {run.seed} diverged: {loss if finite else 'its loss is not finite'}. Take a smaller {options}."
            )
    return lines


def to_json(comparison: Comparison, runs: Sequence[Run], *, interrupted: bool = False) -> str:
    """Return the options, the versions, the summaries and the finished runs, which are not all where the command was interrupted."""
    config = {
        "data": comparison.data,
        **asdict(comparison.settings),
        **asdict(comparison.plan),
        **{name: getattr(comparison, name) for name in ("held_out", "sharpness", "seeds", "backend", "device", "threads")},
    }
    versions = {"sam_kernels": sam_kernels.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    report = {
        "config": config,
        "versions": versions,
        "interrupted": interrupted,
        "summary": [asdict(summary) for summary in summaries_of(runs, comparison.settings)],
        "runs": [asdict(run) for run in runs],
    }
    return output.to_json(report)


def tables(comparison: Comparison, runs: Sequence[Run]) -> Group:
    """Of the runs that have finished: at least one."""
    summaries = summaries_of(runs, comparison.settings)
    found = [_results(summaries, comparison.title, comparison.seeds), _times(summaries)]
    if comparison.sharpness:
        found.insert(1, _sharpness(summaries))
    return Group(*found)


def _results(summaries: Sequence[Summary], title: str, seeds: int) -> Table:
    notes = ["Best epoch: of each run, chosen by looking at the images it is scored on, so better than it should be."]
    if any(summary.test_accuracy.interval for summary in summaries):
        notes.insert(0, "In brackets: 95 % (Wilson), for the number of images that are scored. They include nothing of other seeds.")
    if seeds > 1:
        notes.insert(0, f"Means of {seeds} seeds, ± standard error.")
    result = _table(title, notes)
    result.add_column("with")
    for heading in ("last epoch, %", "best epoch, %", "train loss"):
        result.add_column(heading, justify="right", no_wrap=True)
    best = max(summary.test_accuracy.mean for summary in summaries)
    for summary in summaries:
        accuracy = summary.test_accuracy.text(2, factor=100.0)
        result.add_row(
            summary.optimizer if summary.runs == seeds else f"{summary.optimizer}, {summary.runs} of {seeds} seeds",
            _shown(summary.options),
            f"[bold]{accuracy}[/bold]" if summary.test_accuracy.mean == best else accuracy,
            summary.best_test_accuracy.text(2, factor=100.0),
            f"{summary.train_loss.text(3)}{_divergence(summary)}",
        )
    return result


def _divergence(summary: Summary) -> str:
    if not summary.diverged:
        return ""
    return ", diverged" if summary.runs == 1 else f", {summary.diverged} of {summary.runs} diverged"


def _sharpness(summaries: Sequence[Summary]) -> Table:
    notes = [
        f"Of the Hessian of the training loss at the end, in evaluation mode, on up to {SHARPNESS_IMAGES:,} images: the largest "
        "eigenvalue by Lanczos' method, the trace by Hutchinson's, which is an estimate."
    ]
    result = _table("Sharpness", notes)
    for heading in ("top eigenvalue", "Hessian trace"):
        result.add_column(heading, justify="right", no_wrap=True)
    for summary in summaries:
        estimates = (getattr(summary, name) for name in SHARPNESS)
        result.add_row(summary.optimizer, *("" if each is None else each.text(3) for each in estimates))
    return result


def _times(summaries: Sequence[Summary]) -> Table:
    notes = [
        "Means over the steps after the first. Forward, backward and rest, the optimizer's own work, add up to the step.",
        "With exact norms rwsam makes the gradient of its ascent there, not in the backward pass.",
    ]
    result = _table("Time of a step, ms", notes)
    for heading in ("ms/step", "forward", "backward", "rest", "optimizer share"):
        result.add_column(heading, justify="right", no_wrap=True)
    for summary in summaries:
        seconds = (getattr(summary, name) for name in TIMES)
        result.add_row(summary.optimizer, *(f"{each * 1e3:.2f}" for each in seconds), f"{summary.optimizer_share * 100:.1f} %")
    return result


def _table(title: str, notes: Sequence[str]) -> Table:
    result = Table(title=title, title_justify="left", caption=" ".join(notes), caption_justify="left", box=box.SIMPLE_HEAD)
    result.add_column("optimizer", no_wrap=True)
    return result


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(SHOWN[name].format(value) for name, value in options.items()).replace("_", " ")
