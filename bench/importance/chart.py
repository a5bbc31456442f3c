"""The curves: f - f* over the steps, and the bounds beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.chart import save
from bench.importance.run import WAYS
from sam_kernels import theory

__all__ = ["draw"]

COLORS = {"uniform": "#b05f3c", "importance_l_max": "#7f9aa8", "importance": "#1f6f8b"}


def draw(result: dict[str, Any], path: Path) -> None:
    """A row of panels for each problem, a column for each λ; dashed: the bounds."""
    from matplotlib.figure import Figure

    lambds = sorted({row["lambd"] for problem in result["problems"] for row in problem["rows"]})
    figure = Figure(figsize=(4.2 * len(lambds), 6.4))
    axes = figure.subplots(len(result["problems"]), len(lambds), sharey=True, squeeze=False)
    for line, problem in zip(axes, result["problems"], strict=True):
        for axis, lambd in zip(line, lambds, strict=True):
            for row in (row for row in problem["rows"] if row["lambd"] == lambd):
                times, color = problem["times"], COLORS[row["way"]]
                axis.plot(times, row["gap"], color=color, label=WAYS[row["way"]])
                steps = (problem["mu"], row["L"], row["C"], lambd, row["rho"], row["gamma"])
                axis.plot(times, [theory.pl_bound(t, row["gap"][0], *steps) for t in times], color=color, linestyle="--", linewidth=0.8)
            axis.set_yscale("log")
            axis.set_xscale("log")
            axis.set_xlim(problem["times"][1])
            ratio = problem["L_max"] / problem["L_avg"]
            axis.set_title(f"rows {problem['problem']}: L_max / L_avg = {ratio:.1f}, λ = {lambd:g}", fontsize=9)
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=8, frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=9)
    for line in axes:
        line[0].set_ylabel("f(x) − f*", fontsize=9)
    save(figure, path, dpi=110)
