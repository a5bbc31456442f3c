"""Constant and diminishing learning rates, SAM and SGD, with momentum and without, on the network of ``python -m sam_kernels train``.

arXiv 2401.08060. Its theory has no momentum, and its authors' code sets none. Fixed before the runs: two pairs of weight decay and radius,
``train``'s own and the authors', each with momentum and without; SEEDS; differences are paired by seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bench.linear_models import Floats
from bench.papers.context import Context
from bench.papers.experiment import Column, Experiment, Measured, curve, cut, difference, tune_axes
from sam_kernels import schedules
from sam_kernels.cli.train.data import Digits, load
from sam_kernels.cli.train.optimizers import BASES, MEMBERS, Settings
from sam_kernels.cli.train.plan import Plan
from sam_kernels.cli.train.run import run

__all__ = ["EXPERIMENT", "LR", "SCHEDULES", "SETTINGS", "mean", "one_run"]

LR = 0.1
SEEDS = 10
DATA = "digits"
SCHEDULES: dict[str, Callable[[Optimizer], LRScheduler]] = {  # a step an epoch
    "Constant": schedules.Constant,
    "Diminish 1": schedules.Diminish1,
    "Diminish 2": schedules.Diminish2,
    "Diminish 3": schedules.Diminish3,
}
OPTIMIZERS = {"sgd": "SGD", "sam": "SAM"}
MOMENTUM = 0.9
# Weight decay and radius: train's, and those of the repository of the paper's authors.
PAIRS = ((BASES["sgd"].weight_decay, MEMBERS["sam"].rho), (1e-3, 0.05))
SETTINGS = tuple((momentum, *pair) for pair in PAIRS for momentum in (MOMENTUM, 0.0))
KEYS = ("momentum", "weight_decay", "rho")


@cache
def data() -> Digits:
    return load(DATA)


def one_run(
    optimizer: str, schedule: str, momentum: float, weight_decay: float, rho: float, seed: int, epochs: int, batch_size: int
) -> dict[str, Any]:
    """Test accuracy in % and training loss after each epoch."""
    settings = Settings("sgd", LR, weight_decay, rho, 1.0, momentum=momentum)
    one = run(optimizer, seed, data(), settings, Plan(epochs, batch_size, 0.0), schedule=SCHEDULES[schedule])
    return {"accuracy": [100 * value for value in one.test_accuracy], "train_loss": one.train_loss}


def mean(values: Floats) -> list[float]:
    """Mean and standard error of (seeds,) values, or of differences between two runs of each seed."""
    return [cut(float(values.mean())), cut(float(values.std(ddof=1)) / math.sqrt(len(values)))]


def measure(context: Context) -> Measured:
    epochs, seeds, batch_size = (1, 2, 256) if context.quick else (20, SEEDS, 64)
    size = {"epochs": epochs, "batch_size": batch_size}
    kinds = list(product(SETTINGS, SCHEDULES, OPTIMIZERS))
    jobs = [
        {"optimizer": optimizer, "schedule": name, "seed": seed, **size, **dict(zip(KEYS, setting, strict=True))}
        for setting, name, optimizer in kinds
        for seed in range(seeds)
    ]
    found = context.map(one_run, jobs, "schedules")
    # (kinds, seeds, epochs)
    accuracy, loss = (np.array([each[key] for each in found]).reshape(len(kinds), seeds, epochs) for key in ("accuracy", "train_loss"))
    last = {kind: each[:, -1] for kind, each in zip(kinds, accuracy, strict=True)}
    losses = {kind: cut(float(each[:, -1].mean())) for kind, each in zip(kinds, loss, strict=True)}
    rows = []
    for setting, name in product(SETTINGS, SCHEDULES):
        row: dict[str, Any] = {**dict(zip(KEYS, setting, strict=True)), "schedule": name}
        row |= {optimizer: mean(last[setting, name, optimizer]) for optimizer in OPTIMIZERS}
        row["sam_over_sgd"] = mean(last[setting, name, "sam"] - last[setting, name, "sgd"])
        without = (0.0, *setting[1:])
        for optimizer in OPTIMIZERS:
            own = last[setting, name, optimizer]
            constant = mean(own - last[setting, "Constant", optimizer]) if name != "Constant" else None
            of_momentum = mean(own - last[without, name, optimizer]) if setting != without else None
            row |= {f"over_constant_{optimizer}": constant, f"momentum_{optimizer}": of_momentum}
        row["losses"] = [losses[setting, name, optimizer] for optimizer in OPTIMIZERS]
        rows.append(row)
    points = []
    for (setting, name, optimizer), accuracies, each in zip(kinds, accuracy, loss, strict=True):
        series = {**dict(zip(KEYS, setting, strict=True)), "optimizer": OPTIMIZERS[optimizer], "schedule": name}
        points += curve(series, range(1, epochs + 1), accuracy=accuracies.mean(0), train_loss=each.mean(0))
    return Measured({"data": DATA, "lr": LR, **size, "seeds": seeds}, rows, points)


def draw(measured: Measured) -> Figure:
    figure = Figure(figsize=(11.6, 6.2))
    axes = figure.subplots(2, len(SETTINGS), sharex=True, sharey="row")
    colors = dict(zip(SCHEDULES, ("#444444", "#b05f3c", "#1f6f8b", "#c9a227"), strict=True))
    for column, setting in enumerate(SETTINGS):
        mine = [point for point in measured.points if tuple(point[key] for key in KEYS) == setting]
        for axis, key in zip(axes[:, column], ("accuracy", "train_loss"), strict=True):
            for (name, color), optimizer in product(colors.items(), OPTIMIZERS.values()):
                shown = [point for point in mine if (point["optimizer"], point["schedule"]) == (optimizer, name)]
                style, heights = "-" if optimizer == "SAM" else "--", [point[key] for point in shown]
                axis.plot([point["step"] for point in shown], heights, style, color=color, linewidth=1.2, label=f"{optimizer}, {name}")
        momentum, weight_decay, rho = setting
        axes[0][column].set_title(f"momentum {momentum:g}\nweight decay {weight_decay:g}, ρ = {rho:g}", fontsize=9)
        axes[1][column].set(xlabel="epoch", yscale="log")
    axes[0][0].set_ylabel("test accuracy, %")
    axes[1][0].set_ylabel("training loss")
    axes[0][0].set_ylim(bottom=94 if min(min(row["sgd"][0], row["sam"][0]) for row in measured.rows) > 96 else None)
    tune_axes(figure).subplots_adjust(bottom=0.16)
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, fontsize=8, frameon=False, ncols=len(SCHEDULES), loc="lower center")  # a column a schedule
    return figure


def _with_error(value: list[float]) -> str:
    return f"{value[0]:.2f} ± {value[1]:.2f}"


EXPERIMENT = Experiment(
    "Learning rates that diminish, on a network",
    (
        Column("momentum", "momentum", lambda value: f"{value:g}"),
        Column("weight_decay", "weight decay", lambda value: f"{value:g}"),
        Column("rho", "ρ", lambda value: f"{value:g}"),
        Column("schedule", "learning rate"),
        Column("sgd", "SGD: test accuracy, %", _with_error),
        Column("sam", "SAM: test accuracy, %", _with_error),
        Column("sam_over_sgd", "SAM − SGD", difference),
        Column("over_constant_sgd", "SGD, over Constant", difference),
        Column("over_constant_sam", "SAM, over Constant", difference),
        Column("momentum_sgd", "SGD, with − without momentum", difference),
        Column("momentum_sam", "SAM, with − without momentum", difference),
        Column("losses", "training loss, SGD; SAM", lambda value: "; ".join(f"{each:.2g}" for each in value)),
    ),
    measure,
    draw,
)
