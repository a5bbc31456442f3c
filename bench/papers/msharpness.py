"""Where reweighting wins: m-SAM by m and RW-SAM by β, on networks, wrong labels and batches. arXiv 2509.18001.

Fixed before the runs: METHODS, SCENES and BUDGET below and in ``sharpness_runs.py``, but for the smallest radius, which was added after a
first look. A method is said to be ahead of SAM where the mean of
the differences, seed by seed, is at least TWO_ERRORS of its standard errors above 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.papers.context import Context
from bench.papers.experiment import Column, Experiment, Measured, cut, signed, tune_axes
from bench.papers.sharpness_runs import DATA, IN_TIME, METHODS, SCENES, Budget, Job, Scene, costs_of, measured, runs_of_scene
from sam_kernels.cli.train.optimizers import BASES

__all__ = ["BUDGET", "EXPERIMENT", "TWO_ERRORS", "verdict"]

BUDGET = Budget(epochs=20, radii=(0.05, 0.1, 0.2, 0.4), tuning=2, evaluation=10)
QUICK = Budget(epochs=1, radii=(0.2,), tuning=1, evaluation=2)
TWO_ERRORS = 2.0
NETWORKS = {"group": "GroupNorm", "none": "no normalisation"}


def measure(context: Context) -> Measured:
    budget, scenes = (QUICK, SCENES[1:2]) if context.quick else (BUDGET, SCENES)
    rows: list[dict[str, Any]] = []
    costs = {scene: costs_of(scene, 1 if context.quick else 4) for scene in scenes}
    for scene in scenes:
        name = f"{NETWORKS[scene.normalization]}, batch {scene.batch_size}, {scene.noise:.0%} wrong labels"

        def runs(jobs: Iterable[Job], title: str = name) -> list[dict[str, Any]]:
            return context.map(measured, map(asdict, jobs), title)

        rows += rows_of(scene, runs_of_scene(scene, budget, runs, costs[scene]), costs[scene])
        context.tell(name)
    base = BASES["sgd"]
    settings = {"data": DATA, "lr": base.lr, "weight_decay": base.weight_decay, **base.options, **vars(budget), "two_errors": TWO_ERRORS}
    settings["radii"] = list(budget.radii)
    return Measured(settings, rows, rows)


def rows_of(scene: Scene, found: dict[str, Any], costs: dict[str, float]) -> list[dict[str, Any]]:
    sam = found["SAM"].accuracy
    rows = []
    for title, one in found.items():
        over = one.accuracy - sam
        rows.append(
            {
                "network": NETWORKS[scene.normalization],
                "batch_size": scene.batch_size,
                "noise": scene.noise,
                "method": title,
                "chosen": one.method if title == IN_TIME else None,
                "rho": one.rho,
                "beta": one.beta,
                "epochs": one.epochs,
                "cost": cut(costs[one.method], 3) if one.method in costs else None,
                "accuracy": cut(one.accuracy.mean(), 4),
                "standard_error": cut(_error(one.accuracy), 2),
                "over_sam": None if title == "SAM" else cut(over.mean(), 3),
                "error_over_sam": None if title == "SAM" else cut(_error(over), 2),
                "verdict": None if title == "SAM" else verdict(over),
                "variance": cut(one.variance.mean(), 3),
                "mean_square": cut(one.mean_square.mean(), 3),
            }
        )
    return rows


def verdict(over: Any) -> str:  # (seeds,) differences to SAM, in points
    """Ahead or behind by at least TWO_ERRORS standard errors, or neither."""
    mean, error = over.mean(), _error(over)
    return "level" if abs(mean) < TWO_ERRORS * error or mean == 0 else "ahead" if mean > 0 else "behind"


def _error(values: Any) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def draw(measured: Measured) -> Figure:
    scenes = list(dict.fromkeys((row["network"], row["batch_size"], row["noise"]) for row in measured.rows))
    titles = [method.title for method in METHODS if method.title not in ("SGD", "SAM")] + [IN_TIME]
    figure = Figure(figsize=(9.6, 1.2 + 0.42 * len(titles)))
    axes = np.atleast_1d(figure.subplots(1, len(scenes), sharey=True))
    for axis, scene in zip(axes, scenes, strict=True):
        rows = {row["method"]: row for row in measured.rows if (row["network"], row["batch_size"], row["noise"]) == scene}
        for k, title in enumerate(titles):
            if (row := rows.get(title)) is None:
                continue
            color = {"ahead": "#2c7a4b", "behind": "#b0413e", "level": "#777777"}[row["verdict"]]
            axis.errorbar(row["over_sam"], k, xerr=TWO_ERRORS * row["error_over_sam"], fmt="o", color=color, markersize=4, capsize=2)
        axis.axvline(0, color="#bbbbbb", linewidth=0.8)
        axis.set_title(f"{scene[0]}\nB = {scene[1]}, {scene[2]:.0%} wrong", fontsize=7)
        axis.set_yticks(range(len(titles)), titles, fontsize=7)
    axes[0].invert_yaxis()
    axes[len(axes) // 2].set_xlabel("test accuracy over SAM's, points, two standard errors", fontsize=8)
    return tune_axes(figure)


EXPERIMENT = Experiment(
    "Where reweighting wins",
    (
        Column("network", "network"),
        Column("batch_size", "B"),
        Column("noise", "wrong labels", lambda value: f"{value:.0%}"),
        Column("method", "method"),
        Column("chosen", "which"),
        Column("rho", "ρ", lambda value: f"{value:g}"),
        Column("beta", "β", lambda value: f"{value:g}"),
        Column("epochs", "epochs"),
        Column("cost", "step over SAM's", lambda value: f"{value:.2f}"),
        Column("accuracy", "test accuracy, %", lambda value: f"{value:.2f}"),
        Column("standard_error", "±", lambda value: f"{value:.2f}"),
        Column("over_sam", "over SAM", signed),
        Column("error_over_sam", "±", lambda value: f"{value:.2f}"),
        Column("verdict", "by two errors"),
        Column("variance", "tr V at the end"),
    ),
    measure,
    draw,
)
