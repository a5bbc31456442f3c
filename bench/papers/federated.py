"""FedAvg, FedSAM (arXiv 2206.02618) and a perturbation along the server's last step (FedLESAM, arXiv 2405.18890), by rounds.

Fixed before the runs: all of ``federated_runs.py``, ALPHAS and BUDGET. A first look (seeds 100 and 101, held-out images) set the grids:
FedAvg's learning rate 0.03 was behind 0.1 or 0.3 for each α, and the radius 0.2 was too large. For each α the learning rate is FedAvg's
best on held-out images of the clients, and each method's radius is its best there; other seeds are scored on the test images. A score is
the mean over the LAST rounds. Differences are paired by seed, with TWO_ERRORS standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.linear_models import Floats
from bench.papers.context import Context
from bench.papers.experiment import Column, Experiment, Measured, curve, cut, difference, tune_axes
from bench.papers.federated_runs import BATCH, CLIENTS, DATA, METHODS, PER_ROUND, one_run

__all__ = ["ALPHAS", "BUDGET", "EXPERIMENT", "Budget", "Tuning", "tune"]

ALPHAS = (0.1, 1.0)  # of the Dirichlet distribution: the smaller, the fewer labels a client has
EARLY, LAST = 5, 5  # a round of the table; rounds that a score is the mean of
TWO_ERRORS = 2.0
PASSES = {"fedavg": 1, "fedsam": 2, "server": 1}
COLORS = {"fedavg": "#444444", "fedsam": "#b05f3c", "server": "#1f6f8b"}


@dataclass(frozen=True)
class Budget:
    rounds: int
    rates: tuple[float, ...]
    radii: tuple[float, ...]
    tuning: tuple[int, ...]  # seeds, on held-out images
    evaluation: tuple[int, ...]  # other seeds, on the test images


BUDGET = Budget(20, (0.1, 0.3), (0.02, 0.05, 0.1), (100, 101, 102), tuple(range(10)))
QUICK = Budget(2, (0.1,), (0.05,), (100,), (0, 1))


@dataclass(frozen=True)
class Tuning:
    """What was chosen for one α: FedAvg's learning rate, and a radius for each of the others."""

    lr: float
    rho: dict[str, float]


def score(accuracies: Sequence[float]) -> float:
    return float(np.mean(accuracies[-LAST:]))


def tune(context: Context, alpha: float, budget: Budget) -> Tuning:
    def best(options: Sequence[dict[str, Any]]) -> dict[str, Any]:
        size = {"alpha": alpha, "rounds": budget.rounds, "held_out": True}
        jobs = [each | size | {"seed": seed} for each in options for seed in budget.tuning]
        found = [score(each["accuracy"]) for each in context.map(one_run, jobs, f"α = {alpha:g}: {options[0]['method']}, held out")]
        means = np.array(found).reshape(len(options), len(budget.tuning)).mean(1)
        return options[int(means.argmax())]

    lr = best([{"method": "fedavg", "lr": lr, "rho": 0.0} for lr in budget.rates])["lr"]
    others = [name for name in METHODS if name != "fedavg"]
    return Tuning(lr, {name: best([{"method": name, "lr": lr, "rho": rho} for rho in budget.radii])["rho"] for name in others})


def measure(context: Context) -> Measured:
    budget, alphas = (QUICK, ALPHAS[1:]) if context.quick else (BUDGET, ALPHAS)
    rows: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    for alpha in alphas:
        tuning = tune(context, alpha, budget)
        kinds = [{"method": name, "lr": tuning.lr, "rho": tuning.rho.get(name, 0.0)} for name in METHODS]
        size = {"alpha": alpha, "rounds": budget.rounds, "held_out": False}
        runs = context.map(one_run, [kind | size | {"seed": seed} for kind in kinds for seed in budget.evaluation], f"α = {alpha:g}")
        shape = len(METHODS), len(budget.evaluation), budget.rounds
        found = dict(zip(METHODS, np.array([each["accuracy"] for each in runs]).reshape(shape), strict=True))
        for name, accuracies in found.items():
            rows.append(_row(alpha, name, tuning, found))
            over = accuracies - found["fedavg"]
            values = {"accuracy": accuracies.mean(0), "over_fedavg": over.mean(0), "two_errors": TWO_ERRORS * _error(over)}
            points += curve({"alpha": alpha, "method": name}, range(1, budget.rounds + 1), **values)
        context.tell(f"α = {alpha:g}")
    settings: dict[str, Any] = {"data": DATA, "clients": CLIENTS, "per_round": PER_ROUND, "batch_size": BATCH, "last": LAST}
    settings |= {key: list(value) if isinstance(value, tuple) else value for key, value in vars(budget).items()}
    return Measured(settings | {"two_errors": TWO_ERRORS}, rows, points)


def _row(alpha: float, name: str, tuning: Tuning, found: dict[str, Floats]) -> dict[str, Any]:
    scores = {each: accuracies[:, -LAST:].mean(1) for each, accuracies in found.items()}
    over = {other: None if other == name else _paired(scores[name] - scores[other]) for other in ("fedavg", "fedsam")}
    return {
        "alpha": alpha,
        "method": METHODS[name],
        "lr": tuning.lr,
        "rho": tuning.rho.get(name),
        "passes": PASSES[name],
        "early": cut(found[name][:, min(EARLY, found[name].shape[1]) - 1].mean(), 4),
        "accuracy": cut(scores[name].mean(), 4),
        "over_fedavg": over["fedavg"],
        "over_fedsam": over["fedsam"],
    }


def _paired(differences: Floats) -> list[float]:  # (seeds,) -> the mean, and two standard errors
    return [cut(differences.mean(), 3), cut(TWO_ERRORS * float(_error(differences)), 3)]


def _error(values: Floats) -> Floats:  # over the seeds, the first axis
    return values.std(0, ddof=1) / math.sqrt(len(values))


def draw(measured: Measured) -> Figure:
    alphas = list(dict.fromkeys(row["alpha"] for row in measured.rows))
    figure = Figure(figsize=(8.6, 5.6))
    axes = figure.subplots(2, len(alphas), squeeze=False, sharex=True)
    for column, alpha in zip(axes.T, alphas, strict=True):
        for name, title in METHODS.items():
            shown = [point for point in measured.points if (point["alpha"], point["method"]) == (alpha, name)]
            rounds, accuracy, over, errors = (
                np.array([point[key] for point in shown]) for key in ("step", "accuracy", "over_fedavg", "two_errors")
            )
            column[0].plot(rounds, accuracy, color=COLORS[name], label=title)
            column[1].plot(rounds, over, color=COLORS[name])
            column[1].fill_between(rounds, over - errors, over + errors, color=COLORS[name], alpha=0.15, linewidth=0)
        column[0].set_title(f"α = {alpha:g}", fontsize=9)
        column[1].set_xlabel("round")
        column[1].xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("test accuracy, %")
    axes[1][0].set_ylabel("over FedAvg, points,\ntwo standard errors")
    axes[0][-1].legend(fontsize=8, frameon=False)
    return tune_axes(figure)


EXPERIMENT = Experiment(
    "Clients with unlike labels",
    (
        Column("alpha", "α", lambda value: f"{value:g}"),
        Column("method", "method"),
        Column("lr", "learning rate", lambda value: f"{value:g}"),
        Column("rho", "ρ", lambda value: f"{value:g}"),
        Column("passes", "passes a step"),
        Column("early", f"test accuracy, %, round {EARLY}", lambda value: f"{value:.1f}"),
        Column("accuracy", f"last {LAST} rounds", lambda value: f"{value:.1f}"),
        Column("over_fedavg", "over FedAvg, ± two errors", difference),
        Column("over_fedsam", "over FedSAM, ± two errors", difference),
    ),
    measure,
    draw,
)
