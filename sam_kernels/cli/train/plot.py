"""The curves, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sam_kernels.cli.train.optimizers import PEER
from sam_kernels.cli.train.run import Run

__all__ = ["save_curves", "spans_a_decade"]

_STYLES = ("-", "-.", ":")  # one after the other when the ten colours are used up
_DECADE = 10.0


def save_curves(path: Path, runs: Sequence[Run], *, title: str) -> None:
    """Accuracy and train loss by epoch, one line an optimizer: the mean over its seeds, in a band from the lowest to the highest.

    Losses that span more than a decade have a logarithmic axis. Raises OSError if the file cannot be written.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: nothing global changes, and no display is needed
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy_axes, loss_axes = figure.subplots(1, 2)
    for i, name in enumerate(dict.fromkeys(run.optimizer for run in runs)):
        of_name = [run for run in runs if run.optimizer == name]
        linestyle = "--" if name == PEER else _STYLES[i // 10 % len(_STYLES)]  # it lies upon the curve of sam
        style = {"color": f"C{i % 10}", "linestyle": linestyle}
        for axes, curves in (
            (accuracy_axes, np.array([run.test_accuracy for run in of_name]) * 100),
            (loss_axes, np.array([run.train_loss for run in of_name])),
        ):
            curves[~np.isfinite(curves)] = np.nan  # a diverged run's line ends there
            epochs = np.arange(1, curves.shape[1] + 1)
            axes.plot(epochs, curves.mean(axis=0), label=name, marker="." if len(epochs) == 1 else None, **style)
            axes.fill_between(epochs, curves.min(axis=0), curves.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)
    if spans_a_decade([loss for run in runs for loss in run.train_loss]):
        loss_axes.set_yscale("log", nonpositive="mask")
    accuracy_axes.set_ylabel("accuracy, %")
    loss_axes.set_ylabel("train loss")
    for axes in (accuracy_axes, loss_axes):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    handles, labels = accuracy_axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=10)  # beside the axes: it hides no curve
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def spans_a_decade(losses: Sequence[float]) -> bool:
    """Return whether the largest finite loss is more than ten times the smallest positive one."""
    shown = [loss for loss in losses if 0 < loss < float("inf")]
    return bool(shown) and max(shown) > _DECADE * min(shown)
