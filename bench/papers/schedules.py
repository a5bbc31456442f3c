"""Constant and diminishing learning rates, SAM and SGD, on the network of ``python -m sam_kernels train``. arXiv 2401.08060."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

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


def measure(quick: bool, tell: Callable[[str], None]) -> Measured:
    epochs, seeds = (1, 2) if quick else (20, SEEDS)
    data, base = load(DATA), BASES["sgd"]
    settings = Settings("sgd", LR, base.weight_decay, None, 1.0)
    plan = Plan(epochs, 256 if quick else 64, 0.0)
    rows, points = [], []
    for optimizer, title in OPTIMIZERS.items():
        for name in SCHEDULES:
            runs = [run(optimizer, seed, data, settings, plan, schedule=SCHEDULES[name]) for seed in range(seeds)]
            accuracies, losses = (np.array([getattr(each, key) for each in runs]) for key in ("test_accuracy", "train_loss"))
            last = 100 * accuracies[:, -1]
            rows.append(
                {
                    "optimizer": title,
                    "schedule": name,
                    "accuracy": cut(last.mean()),
                    "standard_error": cut(last.std(ddof=1) / math.sqrt(seeds)),
                    "best": cut(100 * accuracies.max(1).mean()),
                    "train_loss": cut(losses[:, -1].mean()),
                }
            )
            series = {"optimizer": title, "schedule": name}
            points += curve(series, range(1, epochs + 1), accuracy=100 * accuracies.mean(0), train_loss=losses.mean(0))
            tell(f"{title}, {name}")
    kept: dict[str, Any] = {"data": DATA, "lr": LR, "rho": MEMBERS["sam"].rho, "weight_decay": base.weight_decay, **base.options}
    return Measured({**kept, "batch_size": plan.batch_size, "epochs": epochs, "seeds": seeds}, rows, points)


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
