"""What SAM does beyond accuracy: forgetting, noise on weights, rounding, and SAM in the last steps alone (arXiv 2410.10373).

Fixed before the runs: all of ``beyond_runs.py``, METHODS, TESTS and BUDGET; nothing is tuned. A first look (seeds 100 to 102) set three
fine-tunings in the place of one, because the answer depends on it, and added the row of the strongest noise. Differences are paired by
seed, with TWO_ERRORS standard errors. A share of SAM's gain is given where that gain is more than two of its standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.dial.summary import share
from bench.linear_models import Floats
from bench.papers.beyond_runs import BITS, DATA, FINE_TUNINGS, SIGMAS, one_run
from bench.papers.context import Context
from bench.papers.experiment import Column, Experiment, Measured, cut, difference, tune_axes
from sam_kernels.cli.output import rounded
from sam_kernels.cli.prove.networks import DRAWS, LEARNT

__all__ = ["BASE", "EXPERIMENT", "METHODS", "TESTS", "Method"]

WRONG = 0.4  # share of wrong training labels, of one test
TWO_ERRORS = 2.0
SEEDS = 10
BUDGET = {"epochs": 20, "batch_size": 64}
QUICK = {"epochs": 2, "batch_size": 64}


@dataclass(frozen=True)
class Method:
    title: str
    rho: float
    share: float = 1.0  # of the steps, at the end
    whole: str | None = None  # the method that it is a part of


BASE = "sgd"
METHODS = {
    BASE: Method("SGD", 0.0),
    "sam_1": Method("SAM, ρ = 0.1", 0.1),
    "sam_2": Method("SAM, ρ = 0.2", 0.2),
    "last_20": Method("ρ = 0.2, last 20 %", 0.2, 0.2, "sam_2"),
    "last_10": Method("ρ = 0.2, last 10 %", 0.2, 0.1, "sam_2"),
}
COLORS = dict(zip(METHODS, ("#444444", "#e0a67f", "#b05f3c", "#1f6f8b", "#7fb3c8"), strict=True))
SHOWN_SIGMAS = (0.3, 0.5)
TESTS = {  # by what a run gives; "wrong" is another run's accuracy
    "accuracy": "right labels",
    "wrong": f"{WRONG:.0%} wrong labels",
    **{f"kept_{name}": f"upright after rotated digits: lr {lr:g}, momentum {momentum:g}" for name, (lr, momentum) in FINE_TUNINGS.items()},
    **{f"sigma_{sigma:g}": f"noise on weights, σ = {sigma:g}" for sigma in SHOWN_SIGMAS},
    **{f"bits_{bits}": f"weights of {bits} bits" for bits in BITS},
}


def measure(context: Context) -> Measured:
    size, seeds = (QUICK, 2) if context.quick else (BUDGET, SEEDS)
    methods = list(METHODS)[::2] if context.quick else list(METHODS)
    kinds = [{"rho": METHODS[name].rho, "share": METHODS[name].share, "noise": noise} for noise in (0.0, WRONG) for name in methods]
    runs = iter(context.map(one_run, [kind | size | {"seed": seed} for kind in kinds for seed in range(seeds)], "beyond"))
    found = {name: [next(runs) for _ in range(seeds)] for name in methods}
    for name in methods:
        for run in found[name]:
            run["wrong"] = next(runs)["accuracy"]
    values = {name: {key: np.array([run[key] for run in found[name]]) for key in found[name][0]} for name in methods}
    rows = [{"test": title, "base": cut(values[BASE][key].mean(), 4)} | _gains(key, values) for key, title in TESTS.items()]
    points = [
        {"method": METHODS[name].title, "quantity": key, "mean": cut(each.mean(), 4), "over_sgd": over[0], "two_errors": over[1]}
        for name in methods
        for key, each in values[name].items()
        for over in [_paired(each - values[BASE][key])]
    ]
    settings = {"data": DATA, "seeds": seeds, "learnt": LEARNT, "draws": DRAWS, "two_errors": TWO_ERRORS, **size}
    return Measured(settings | {"fine_tunings": {name: list(pair) for name, pair in FINE_TUNINGS.items()}}, rows, points)


def _gains(key: str, values: dict[str, dict[str, Floats]]) -> dict[str, Any]:
    """Of each method over SGD: the mean, two standard errors, and the share of SAM's gain or None."""
    gains = {name: each[key] - values[BASE][key] for name, each in values.items()}
    found: dict[str, Any] = dict.fromkeys(name for name in METHODS if name != BASE)
    for name in values:
        if name == BASE:
            continue
        whole = METHODS[name].whole
        part = share(gains[name].tolist(), gains[whole].tolist()) if whole in gains else None
        found[name] = [*_paired(gains[name]), None if part is None else cut(part.mean, 2)]
    return found


def _paired(differences: Floats) -> list[float]:  # (seeds,)
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return [cut(differences.mean(), 3), cut(TWO_ERRORS * error, 3)]


def draw(measured: Measured) -> Figure:
    figure = Figure(figsize=(9.6, 6.4))
    forgetting, noise, wrong, bits = figure.subplots(2, 2).flat
    found = {(point["method"], point["quantity"]): point for point in measured.points}
    names = [name for name in METHODS if (METHODS[name].title, "accuracy") in found]

    def bars(axis: Any, keys: Sequence[str], labels: Sequence[str], ylabel: str) -> None:
        """Over SGD, a group of bars for each key."""
        others = [name for name in names if name != BASE]
        for k, name in enumerate(others):
            shown = [found[METHODS[name].title, key] for key in keys]
            places = np.arange(len(keys)) + (k - (len(others) - 1) / 2) * 0.8 / len(others)
            errors = [point["two_errors"] for point in shown]
            axis.bar(places, [point["over_sgd"] for point in shown], 0.8 / len(others), color=COLORS[name], label=METHODS[name].title)
            axis.errorbar(places, [point["over_sgd"] for point in shown], yerr=errors, fmt="none", ecolor="#222222", elinewidth=0.8)
        axis.axhline(0, color="#888888", linewidth=0.8)
        axis.set_xticks(range(len(keys)), labels)
        axis.set_ylabel(ylabel, fontsize=8)

    over = "over SGD, points, two standard errors"
    bars(
        forgetting,
        [f"kept_{name}" for name in FINE_TUNINGS],
        [f"lr {lr:g}\nmomentum {momentum:g}" for lr, momentum in FINE_TUNINGS.values()],
        over,
    )
    forgetting.set_title(f"upright accuracy kept, {LEARNT:g} % of rotated digits learnt", fontsize=9)
    for name in names:
        shown = [found[METHODS[name].title, key] for key in ("accuracy", *(f"sigma_{sigma:g}" for sigma in SIGMAS))]
        noise.plot(
            [0, *SIGMAS], [point["mean"] for point in shown], marker="o", markersize=3, color=COLORS[name], label=METHODS[name].title
        )
    noise.set_xlabel("standard deviation over the weights' root mean square, σ", fontsize=8)
    noise.set_ylabel("test accuracy, %", fontsize=8)
    noise.set_title("noise on the weights", fontsize=9)
    bars(wrong, ["accuracy", "wrong"], ["right labels", f"{WRONG:.0%} wrong labels"], over)
    wrong.set_title("test accuracy", fontsize=9)
    bars(bits, [f"bits_{each}" for each in BITS], [f"{each} bits" for each in BITS], over)
    bits.set_title("rounded to nearest", fontsize=9)
    noise.legend(fontsize=8, frameon=False)
    return tune_axes(figure)


def _gain(value: Sequence[Any]) -> str:
    *gain, part = value
    return difference(gain) + ("" if part is None else f" ({rounded(part, 2):.0%})")


EXPERIMENT = Experiment(
    "Beyond accuracy",
    (
        Column("test", "test accuracy, %"),
        Column("base", METHODS[BASE].title, lambda value: f"{value:.2f}"),
        *(Column(name, method.title, _gain) for name, method in METHODS.items() if name != BASE),
    ),
    measure,
    draw,
)
