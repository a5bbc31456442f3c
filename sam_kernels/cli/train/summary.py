"""Runs of one optimizer over the seeds, summarised: means with their standard errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sam_kernels.cli.train.optimizers import Settings, options_of
from sam_kernels.cli.train.run import Run

__all__ = ["Estimate", "Summary", "summaries_of", "summarise"]


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


def summarise(runs: Sequence[Run], options: Mapping[str, Any]) -> Summary:
    return Summary(
        runs[0].optimizer,
        options,
        Estimate.of([run.test_accuracy[-1] for run in runs]),
        Estimate.of([max(run.test_accuracy) for run in runs]),
        Estimate.of([run.train_loss[-1] for run in runs]),
        statistics.fmean(run.seconds_per_step for run in runs),
        statistics.fmean(run.forward_seconds for run in runs),
        statistics.fmean(run.backward_seconds for run in runs),
        statistics.fmean(run.rest_seconds for run in runs),
        statistics.fmean(run.optimizer_share for run in runs),
    )


def summaries_of(runs: Sequence[Run], settings: Settings) -> list[Summary]:
    """Return a summary for each optimizer, in the order of its first run."""
    names = dict.fromkeys(run.optimizer for run in runs)
    return [summarise([run for run in runs if run.optimizer == name], options_of(name, settings)) for name in names]
