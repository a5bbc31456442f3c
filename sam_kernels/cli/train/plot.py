"""The curves, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sam_kernels.cli.train.run import Run

__all__ = ["save_curves"]


def save_curves(path: Path, runs: Sequence[Run], *, title: str) -> None:
    """Accuracy and train loss by epoch, one line an optimizer: the mean over its seeds, in a band from the lowest to the highest."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: nothing global changes, and no display is needed
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy_axes, loss_axes = figure.subplots(1, 2)
    for name in dict.fromkeys(run.optimizer for run in runs):
        of_name = [run for run in runs if run.optimizer == name]
        for axes, curves in (
            (accuracy_axes, np.array([run.test_accuracy for run in of_name]) * 100),
            (loss_axes, np.array([run.train_loss for run in of_name])),
        ):
            epochs = np.arange(1, curves.shape[1] + 1)
            (line,) = axes.plot(epochs, curves.mean(axis=0), label=name, marker="." if len(epochs) == 1 else None)
            axes.fill_between(epochs, curves.min(axis=0), curves.max(axis=0), color=line.get_color(), alpha=0.15, linewidth=0)
    accuracy_axes.set_ylabel("accuracy, %")
    loss_axes.set_ylabel("train loss")
    for axes in (accuracy_axes, loss_axes):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    accuracy_axes.legend(loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
