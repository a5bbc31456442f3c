"""The final tables: accuracy and loss, then the time of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from sam_kernels.cli.train.comparison import Comparison
from sam_kernels.cli.train.run import Run
from sam_kernels.cli.train.summary import Summary, summaries_of

__all__ = ["tables"]

SHOWN = {
    "rho": "rho {:g}",
    "lambd": "lambda {}",
    "micro_batch_size": "m {}",
    "beta": "beta {:g}",
    "norms": "{}",
    "micro_batch": "m {}",
    "num_directions": "K {}",
    "theta": "theta {:g}",
    "alpha": "alpha {:g}",
    "kappa": "kappa {:g}",
    "k": "k {}",
}


def tables(comparison: Comparison, runs: Sequence[Run]) -> Group:
    summaries = summaries_of(runs, comparison.settings)
    return Group(_results(summaries, comparison.title, comparison.seeds), _times(summaries))


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


def _times(summaries: Sequence[Summary]) -> Table:
    notes = [
        "Medians of all passes of a step, and of the rest, which is the optimizer's own.",
        "With exact norms rwsam makes the gradient of its ascent there, not in the backward pass.",
    ]
    result = _table("Time of a step, ms", notes)
    for heading in ("ms/step", "forward", "backward", "rest", "optimizer share"):
        result.add_column(heading, justify="right", no_wrap=True)
    for summary in summaries:
        times = (summary.seconds_per_step, summary.forward_seconds, summary.backward_seconds, summary.rest_seconds)
        result.add_row(summary.optimizer, *(f"{seconds * 1e3:.2f}" for seconds in times), f"{summary.optimizer_share * 100:.1f} %")
    return result


def _table(title: str, notes: Sequence[str]) -> Table:
    result = Table(title=title, title_justify="left", caption=" ".join(notes), caption_justify="left", box=box.SIMPLE_HEAD)
    result.add_column("optimizer", no_wrap=True)
    return result


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(SHOWN[name].format(value) for name, value in options.items()).replace("_", " ")
