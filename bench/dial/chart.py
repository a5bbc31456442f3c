"""The figure: what a method gains over the base by what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.chart import save
from bench.dial.methods import BASE, METHODS, SAM
from bench.dial.results import PROTOCOLS, Results
from bench.dial.tasks import TASKS

__all__ = ["draw"]

# Shape and shade differ both, so that points are told apart without colours.
LOOKS = dict(
    zip(
        METHODS,
        ("o k", "s k", "D #1f6f8b", "^ #b05f3c", "v #b05f3c", "> #b05f3c", "P #6a994e", "X #6a994e", "* #c9a227", "h #7a5195", "p #7a5195"),
        strict=True,
    )
)


def draw(result: dict[str, Any], path: Path) -> None:
    """A column for each task, a row for each protocol. Bars: standard errors of paired differences."""
    from matplotlib.figure import Figure

    found = Results(result)
    figure = Figure(figsize=(4.2 * len(found.tasks), 7.6))
    axes = figure.subplots(len(PROTOCOLS), len(found.tasks), squeeze=False, sharex=True)
    for line, (protocol, title) in zip(axes, PROTOCOLS.items(), strict=True):
        for axis, name in zip(line, found.tasks, strict=True):
            for method in found.methods:
                marker, color = LOOKS[method].split()
                gain, (low, cost, high) = found.gain(name, method, protocol), found.cost(name, method)
                axis.errorbar(
                    cost,
                    gain.mean,
                    yerr=gain.standard_error,
                    xerr=[[max(0.0, cost - low)], [max(0.0, high - cost)]],
                    fmt=marker,
                    color=color,
                    markersize=7,
                    linewidth=1,
                    label=METHODS[method].title,
                )
            ends = [(found.cost(name, method)[1], found.gain(name, method, protocol).mean) for method in (BASE, SAM)]
            axis.plot(*zip(*ends, strict=True), color="#999999", linewidth=0.8, linestyle=":", zorder=0)
            axis.set_title(f"{TASKS[name].title}, {title}", fontsize=10)
            axis.set_ylabel(f"gain over the base, {_unit(TASKS[name].metric)}", fontsize=9)
            axis.tick_params(labelsize=9)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("training step over one of the base (left is cheaper)", fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=9, frameon=False)
    save(figure, path, dpi=100, bottom=0.11)


def _unit(metric: str) -> str:
    """Return "points" for percent: a difference of percentages; otherwise what the metric counts."""
    return "points" if metric.endswith("%") else metric.removeprefix("test ")
