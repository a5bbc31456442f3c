"""The final table."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from sam_kernels.cli._train_summary import Summary

__all__ = ["table"]


def table(summaries: Sequence[Summary], *, title: str, seeds: int) -> Table:
    notes = [
        "Test accuracy: of the last epoch, not of the best one.",
        "Optimizer share: of a step's time, what forward and backward passes (one, or two for a sharpness-aware step) leave.",
    ]
    if seeds > 1:
        notes.insert(0, f"Means of {seeds} seeds, ± standard error.")
    result = Table(title=title, title_justify="left", caption=" ".join(notes), caption_justify="left", box=box.SIMPLE_HEAD)
    result.add_column("optimizer")
    for heading in ("rho", "test accuracy %", "train loss", "ms/step", "optimizer share"):
        result.add_column(heading, justify="right", no_wrap=True)
    best = max(summary.test_accuracy.mean for summary in summaries)
    for summary in summaries:
        accuracy = summary.test_accuracy.text(2, factor=100.0)
        result.add_row(
            summary.optimizer,
            "-" if summary.rho is None else f"{summary.rho:g}",
            f"[bold]{accuracy}[/bold]" if summary.test_accuracy.mean == best else accuracy,
            f"{summary.train_loss.mean:.4f}",
            f"{summary.seconds_per_step * 1e3:.2f}",
            f"{summary.optimizer_share * 100:.1f} %",
        )
    return result
