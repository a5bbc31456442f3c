"""Constant and diminishing learning rates, SAM and SGD, on the network of ``python -m sam_kernels train``. arXiv 2401.08060."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bench.papers.context import Context
from bench.papers.experiment import Column, Experiment, Measured, curve, cut, tune_axes
from sam_kernels import schedules
from sam_kernels.cli.train.data import load
from sam_kernels.cli.train.optimizers import BASES, MEMBERS, Settings
from sam_kernels.cli.train.run import Plan, run

__all__ = ["EXPERIMENT", "LR", "SCHEDULES"]

LR = 0.1
SEEDS = 4
DATA = "digits"
SCHEDULES: dict[str, Callable[[Optimizer], LRScheduler]] = {  # a step an epoch
    "Constant": schedules.Constant,
    "Diminish 1": schedules.Diminish1,
    "Diminish 2": schedules.Diminish2,
    "Diminish 3": schedules.Diminish3,
}
OPTIMIZERS = {"sgd": "SGD", "sam": "SAM"}


def one_run(optimizer: str, schedule: str, seed: int, epochs: int, batch_size: int) -> dict[str, Any]:
    """Test accuracy in % and training loss after each epoch."""
    settings = Settings("sgd", LR, BASES["sgd"].weight_decay, None, 1.0)
    one = run(optimizer, seed, load(DATA), settings, Plan(epochs, batch_size, 0.0), schedule=SCHEDULES[schedule])
    return {"accuracy": [100 * value for value in one.test_accuracy], "train_loss": one.train_loss}


def measure(context: Context) -> Measured:
    epochs, seeds, batch_size = (1, 2, 256) if context.quick else (20, SEEDS, 64)
    size = {"epochs": epochs, "batch_size": batch_size}
    kinds = [{"optimizer": optimizer, "schedule": name} for optimizer in OPTIMIZERS for name in SCHEDULES]
    found = context.map(one_run, [kind | size | {"seed": seed} for kind in kinds for seed in range(seeds)], "schedules")
    rows, points = [], []
    for title in OPTIMIZERS.values():
        for name in SCHEDULES:
            runs, found = found[:seeds], found[seeds:]
            accuracies, losses = (np.array([each[key] for each in runs]) for key in ("accuracy", "train_loss"))
            last = accuracies[:, -1]
            rows.append(
                {
                    "optimizer": title,
                    "schedule": name,
                    "accuracy": cut(last.mean()),
                    "standard_error": cut(last.std(ddof=1) / math.sqrt(seeds)),
                    "best": cut(accuracies.max(1).mean()),
                    "train_loss": cut(losses[:, -1].mean()),
                }
            )
            series = {"optimizer": title, "schedule": name}
            points += curve(series, range(1, epochs + 1), accuracy=accuracies.mean(0), train_loss=losses.mean(0))
    base = BASES["sgd"]
    kept: dict[str, Any] = {"data": DATA, "lr": LR, "rho": MEMBERS["sam"].rho, "weight_decay": base.weight_decay, **base.options}
    return Measured({**kept, **size, "seeds": seeds}, rows, points)


def draw(measured: Measured) -> Figure:
    figure = Figure(figsize=(8.6, 3.8))
    axes = figure.subplots(1, 2)
    colors = dict(zip(SCHEDULES, ("#444444", "#b05f3c", "#1f6f8b", "#c9a227"), strict=True))
    for axis, (key, label) in zip(axes, (("accuracy", "test accuracy, %"), ("train_loss", "training loss")), strict=True):
        for optimizer in OPTIMIZERS.values():
            for name, color in colors.items():
                chosen = {"optimizer": optimizer, "schedule": name}
                shown = [point for point in measured.points if chosen.items() <= point.items()]
                style = "-" if optimizer == "SAM" else "--"
                axis.plot(
                    [point["step"] for point in shown], [point[key] for point in shown], style, color=color, label=f"{optimizer}, {name}"
                )
        axis.set(xlabel="epoch", ylabel=label)
    axes[0].set_ylim(bottom=90 if min(row["accuracy"] for row in measured.rows) > 92 else None)
    axes[1].set_yscale("log")
    axes[1].legend(fontsize=7, frameon=False)
    return tune_axes(figure)


EXPERIMENT = Experiment(
    "Learning rates that diminish, on a network",
    (
        Column("optimizer", "optimizer"),
        Column("schedule", "learning rate"),
        Column("accuracy", "test accuracy, %, last epoch", lambda value: f"{value:.2f}"),
        Column("standard_error", "standard error", lambda value: f"{value:.2f}"),
        Column("best", "best epoch", lambda value: f"{value:.2f}"),
        Column("train_loss", "training loss", lambda value: f"{value:.2g}"),
    ),
    measure,
    draw,
)
