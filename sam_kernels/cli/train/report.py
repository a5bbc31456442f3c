"""The results of a comparison: means over the seeds with their standard errors, as tables and as JSON."""

from __future__ import annotations

import json
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
from sam_kernels.cli.train.comparison import Comparison
from sam_kernels.cli.train.optimizers import Settings, options_of
from sam_kernels.cli.train.run import Run
from sam_kernels.cli.train.sharpness import IMAGES

__all__ = ["SHOWN", "Estimate", "Summary", "summaries_of", "summarise", "tables", "to_json"]

TIMES = ("seconds_per_step", "forward_seconds", "backward_seconds", "rest_seconds", "optimizer_share")  # of a run and of a summary
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

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        if len(values) < 2 or not all(map(math.isfinite, values)):
            return cls(statistics.fmean(values), None)
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))

    def text(self, decimals: int, factor: float = 1.0) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error * factor:.{decimals}f}"
        return f"{self.mean * factor:.{decimals}f}{error}"


@dataclass(frozen=True)
class Summary:
    optimizer: str
    options: Mapping[str, Any]  # what the optimizer was run with beyond its base's
    test_accuracy: Estimate  # after the last epoch
    best_test_accuracy: Estimate  # of each run's best epoch, which is chosen by looking at the test set: too good
    train_loss: Estimate  # mean of the last epoch
    seconds_per_step: float
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
        Estimate.of([run.test_accuracy[-1] for run in runs]),
        Estimate.of([max(run.test_accuracy) for run in runs]),
        Estimate.of([run.train_loss[-1] for run in runs]),
        **times,
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


def to_json(comparison: Comparison, runs: Sequence[Run]) -> str:
    """Return the options, the versions, the summaries and the runs."""
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
        "summary": [asdict(summary) for summary in summaries_of(runs, comparison.settings)],
        "runs": [asdict(run) for run in runs],
    }
    return json.dumps(_finite(report), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """A diverged run's nan and inf become null: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tables(comparison: Comparison, runs: Sequence[Run]) -> Group:
    summaries = summaries_of(runs, comparison.settings)
    found = [_results(summaries, comparison.title, comparison.seeds), _times(summaries)]
    if comparison.sharpness:
        found.insert(1, _sharpness(summaries))
    return Group(*found)


def _results(summaries: Sequence[Summary], title: str, seeds: int) -> Table:
    notes = ["Best epoch: of each run, chosen by looking at the images it is scored on, so better than it should be."]
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
            summary.optimizer,
            _shown(summary.options),
            f"[bold]{accuracy}[/bold]" if summary.test_accuracy.mean == best else accuracy,
            summary.best_test_accuracy.text(2, factor=100.0),
            summary.train_loss.text(3),
        )
    return result


def _sharpness(summaries: Sequence[Summary]) -> Table:
    notes = [
        f"Of the Hessian of the training loss at the end, in evaluation mode, on up to {IMAGES:,} images: the largest eigenvalue by "
        "Lanczos' method, the trace by Hutchinson's, which is an estimate."
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
        "Medians of all passes of a step, and of the rest, which is the optimizer's own.",
        "With exact norms rwsam makes the gradient of its ascent there, not in the backward pass.",
    ]
    result = _table("Time of a step, ms", notes)
    for heading in ("ms/step", "forward", "backward", "rest", "optimizer share"):
        result.add_column(heading, justify="right", no_wrap=True)
    for summary in summaries:
        *seconds, share = (getattr(summary, name) for name in TIMES)
        result.add_row(summary.optimizer, *(f"{each * 1e3:.2f}" for each in seconds), f"{share * 100:.1f} %")
    return result


def _table(title: str, notes: Sequence[str]) -> Table:
    result = Table(title=title, title_justify="left", caption=" ".join(notes), caption_justify="left", box=box.SIMPLE_HEAD)
    result.add_column("optimizer", no_wrap=True)
    return result


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(SHOWN[name].format(value) for name, value in options.items()).replace("_", " ")
