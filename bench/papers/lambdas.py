"""Which λ is best? Open in arXiv 2503.02225. Here with the radius and the learning rate tuned for each λ, on eight problems.

Everything is chosen on some seeds (of the digits: on held-out training images) and reported on others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.papers.context import Context
from bench.papers.experiment import COMPARED, Column, Experiment, Measured, tune_axes
from bench.papers.lambda_choice import MIXES, Chosen, Mix, as_shown, effects, of_json, row_of
from bench.papers.lambda_digits import DATA, Budget, measure_digits
from bench.papers.lambda_digits import RADII as DIGITS_RADII
from bench.papers.lambda_digits import RATES as DIGITS_RATES
from bench.papers.lambda_problems import CLASSES, RADII, RATES, piece

__all__ = ["EXPERIMENT"]

SCORES = ("training: f − f*", "test loss")
NOISES = (0.0, 0.4)
QUICK = ("squares_10", "logistic")


def measure(context: Context) -> Measured:
    tuning, evaluation = (2, 3) if context.quick else (6, 20)
    budget = Budget(epochs=10, tuning=2, evaluation=6)
    if context.quick:
        budget = Budget(epochs=1, tuning=1, evaluation=2, mixes=(0.0, 1.0), batch_size=256)
    settings: dict[str, Any] = {"tuning": tuning, "evaluation": evaluation, "radii": list(RADII), "rates": list(RATES)}
    rows: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []

    def add(problem: str, score: str, kind: str, chosen: Mapping[Mix, Chosen]) -> None:
        rows.append({"problem": problem, "score": score, "kind": kind, **row_of(chosen, kind)})
        for lambd, values in effects(chosen).items():
            mean, error = as_shown(values, kind)
            one = {"problem": problem, "score": score, "kind": kind, "lambd": lambd, "effect": mean, "standard_error": error}
            points.append(one | {"rho": chosen[lambd].rho, "gamma": chosen[lambd].gamma})

    names = QUICK if context.quick else tuple(CLASSES)
    size = {"tuning": tuning, "evaluation": evaluation, "compared": COMPARED[context.quick]}
    jobs = [{"name": name, "steps": 60 if context.quick else CLASSES[name].steps, **size} for name in names]
    for name, found in zip(names, context.map(piece, jobs, "linear models"), strict=True):
        settings[name] = found["compared"]
        for score, chosen in zip(SCORES, found["chosen"], strict=True):
            add(CLASSES[name].title, score, "ratio", of_json(chosen))
    for noise in NOISES[-1:] if context.quick else NOISES:
        add(f"digits, {noise:.0%} wrong labels", "test error, %", "difference", measure_digits(context, noise, budget))
    digits = {
        "data": DATA,
        "epochs": budget.epochs,
        "batch_size": budget.batch_size,
        "radii": list(DIGITS_RADII),
        "rates": list(DIGITS_RATES),
    }
    settings["digits"] = digits | {"tuning": budget.tuning, "evaluation": budget.evaluation}
    return Measured(settings, rows, points)


def draw(measured: Measured) -> Figure:
    problems = list(dict.fromkeys(row["problem"] for row in measured.rows))
    columns = min(4, len(problems))
    figure = Figure(figsize=(3.4 * columns, 2.9 * -(-len(problems) // columns)))
    axes = figure.subplots(-(-len(problems) // columns), columns, squeeze=False)
    for axis, problem in zip(axes.flat, problems, strict=False):
        _panel(axis, [point for point in measured.points if point["problem"] == problem], problem)
    for axis in axes.flat[len(problems) :]:
        axis.set_visible(False)
    return tune_axes(figure)


def _panel(axis: Axes, points: list[dict[str, Any]], title: str) -> None:
    """λ across; SGD is the line."""
    names = [str(lambd) for lambd in MIXES]
    is_ratio = points[0]["kind"] == "ratio"
    scores = list(dict.fromkeys(point["score"] for point in points))
    for score, color, aside in zip(scores, ("#b05f3c", "#1f6f8b"), (-0.15, 0.15), strict=False):
        shown = [point for point in points if point["score"] == score]
        places, heights = [names.index(str(point["lambd"])) + aside for point in shown], [point["effect"] for point in shown]
        errors = [_bars(point) for point in shown]
        axis.errorbar(places, heights, np.transpose(errors), fmt="o", markersize=3, linewidth=1, color=color, label=score)
    axis.axhline(1.0 if is_ratio else 0.0, color="#444444", linewidth=0.8)
    if is_ratio and max(point["effect"] for point in points) > 2:
        axis.set_yscale("log")
    elif is_ratio:  # no closer look than at a few percent
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, 0.97), max(high, 1.03))
    axis.set_xticks(range(len(names)), names, rotation=90)
    axis.set_title(title, fontsize=9)
    axis.set_ylabel("over SGD's" if is_ratio else "less SGD's, points", fontsize=8)
    axis.legend(fontsize=6.5, frameon=False)


def _bars(point: dict[str, Any]) -> tuple[float, float]:
    """Two standard errors down and up; of a geometric mean they are factors."""
    mean, error = point["effect"], 2 * point["standard_error"]
    return (mean - mean * math.exp(-error / mean), mean * math.exp(error / mean) - mean) if point["kind"] == "ratio" else (error, error)


def _mix(lambd: float | str) -> str:
    return lambd if isinstance(lambd, str) else f"{lambd:g}"


def _effect(value: tuple[float, float]) -> str:
    """Two digits of the error, four decimals at most."""
    mean, error = value
    decimals = min(4, max(0, 1 - math.floor(math.log10(error)))) if error > 0 else 4
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"


def _alike(lambds: list[float | str]) -> str:
    return "all" if len(lambds) == len(MIXES) else ", ".join(map(_mix, lambds))


EXPERIMENT = Experiment(
    "The best λ",
    (
        Column("problem", "problem"),
        Column("score", "score"),
        Column("sgd", "SGD", lambda value: f"{value:.3g}"),
        *(Column(f"effect_{lambd}", f"λ = {_mix(lambd)}", _effect) for lambd in (0.0, 0.5, 1.0, "1/t", "1-1/t")),
        Column("best", "λ chosen", _mix),
        Column("rho", "its ρ", lambda value: f"{value:g}"),
        Column("effect", "what came of it", _effect),
        Column("alike", "not told apart from it", _alike),
    ),
    measure,
    draw,
)
