"""Constant against diminishing steps of SAM on f = x'diag(1, 3)x / 2. arXiv 2401.08060.

Where f = a x² / 2 the constant steps end in a cycle between x and -x: -x = (1 - t a) x - t a ρ, that is |∇f| = t a² ρ / (2 - t a).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench import batched
from bench.linear_models import Floats, LinearModels
from bench.papers.context import Context
from bench.papers.experiment import COMPARED, Column, Experiment, Measured, compare, curve, cut, look, together, tune_axes

__all__ = ["EXPERIMENT", "PIECES", "cycle", "piece"]

CURVATURES = (1.0, 3.0)
T, RHO, P = 0.2, 0.1, 0.001
STARTS = {"(1, 1)": (1.0, 1.0), "(0, 1)": (0.0, 1.0), "(-2, 0.3)": (-2.0, 0.3), "(5, -4)": (5.0, -4.0), "(1, 0)": (1.0, 0.0)}
WAYS = {
    "constant": ("t = 0.2", "ρ = 0.1"),
    "constant_almost": ("t = 0.2", "ρ = 0.1 / k^0.001"),
    "diminishing_constant": ("t = 1 / k", "ρ = 0.1"),
    "diminishing": ("t = 1 / k", "ρ = 0.1 / k^0.001"),
}
# By learning rate. A step of two numbers is nearly all overhead, and each piece has that of its own: more of them would take longer.
PIECES = (("constant", "constant_almost"), ("diminishing_constant", "diminishing"))
TARGETS = {"constant": 0.1286, "diminishing": 2.2e-6}  # what this package was specified to reproduce


def cycle(a: float, t: float, rho: float) -> float:
    """|∇f| on the cycle of SAM with constant steps on f = a x² / 2."""
    return t * a * a * rho / (2 - t * a)


def piece(ways: Sequence[str], times: Sequence[int], compared: int) -> dict[str, Any]:
    """``norms``: of each way and start, ‖∇f‖ at each of the times; ``compared``: with the optimizer, all runs for so many steps."""
    # The minimiser is 0, and A'A = diag(1, 3).
    models = LinearModels("squares", np.diag(np.sqrt(CURVATURES))[None], np.zeros((1, 2)), weight=1.0)
    runs = list(product(ways, STARTS))
    start = np.array([[STARTS[name] for _, name in runs]])
    diminishes = np.array([way.startswith("diminishing") for way, _ in runs])
    almost = np.array([way in ("constant_almost", "diminishing") for way, _ in runs])

    def gamma(k: int) -> Floats:
        return np.where(diminishes, 1 / k, T)

    def rho(k: int) -> Floats:
        return np.where(almost, RHO / k**P, RHO)

    steps = batched.Steps(rho, 1.0, gamma)
    checked = compare(models, start, [None] * compared, steps, len(runs))
    seen = look(models, start, (None for _ in range(times[-1])), steps, times, models.gradient_norms)[:, 0]
    norms: dict[str, dict[str, list[float]]] = {way: {} for way in ways}
    for k, (way, name) in enumerate(runs):
        norms[way][name] = seen[:, k].tolist()
    return {"norms": norms, "compared": checked}


def measure(context: Context) -> Measured:
    number = 2000 if context.quick else 200_000
    times = batched.times_of(number, 150)
    size = {"times": times, "compared": COMPARED[context.quick]}
    pieces = context.map(piece, [{"ways": ways} | size for ways in PIECES], "stall")
    settings: dict[str, Any] = {"steps": number, **together([each["compared"] for each in pieces])}
    norms = {way: found for each in pieces for way, found in each["norms"].items()}
    rows, points = [], []
    for way in WAYS:
        found = {name: np.array(each) for name, each in norms[way].items()}
        off_axis = [cut(each[-1]) for name, each in found.items() if name != "(1, 0)"]
        settled = cycle(CURVATURES[1], T, RHO / (number**P if "almost" in way else 1))
        rows.append(
            {
                "way": way,
                "steps": WAYS[way][0],
                "radius": WAYS[way][1],
                "least": min(off_axis),
                "largest": max(off_axis),
                "on_axis": cut(found["(1, 0)"][-1]),
                "cycle": cut(settled) if way.startswith("constant") else None,
                "target": TARGETS.get(way),
            }
        )
        for name, each in found.items():
            points += curve({"way": way, "start": name}, times, gradient_norm=each)
    return Measured(settings, rows, points)


def draw(measured: Measured) -> Figure:
    figure = Figure(figsize=(6.4, 4.0))
    axis = figure.subplots()
    colors = dict(zip(WAYS, ("#d8a583", "#b05f3c", "#9fc3d0", "#1f6f8b"), strict=True))
    for way, (steps, radius) in WAYS.items():
        shown = [point for point in measured.points if point["way"] == way and point["start"] == "(1, 1)" and point["step"] > 0]
        style = "--" if "k" in radius else "-"  # the two radii make nearly the same curve
        times, norms = ([point[key] for point in shown] for key in ("step", "gradient_norm"))
        axis.plot(times, norms, style, color=colors[way], label=f"{steps}, {radius}")
    axis.axhline(cycle(CURVATURES[1], T, RHO), color="#444444", linewidth=0.8, linestyle=":", label="cycle: t a² ρ / (2 − t a), a = 3")
    axis.set(xscale="log", yscale="log", xlabel="step", ylabel="‖∇f‖")
    axis.legend(fontsize=8, frameon=False)
    return tune_axes(figure)


def _figures(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.3g}" if not math.isclose(value, 0) else "0"


EXPERIMENT = Experiment(
    "SAM with constant steps stalls",
    (
        Column("steps", "learning rate"),
        Column("radius", "radius"),
        Column("largest", "‖∇f‖ at the end, largest of four starts", _figures),
        Column("least", "least", _figures),
        Column("on_axis", "from (1, 0)", _figures),
        Column("cycle", "cycle by formula", _figures),
        Column("target", "to reproduce", lambda value: f"{value:g}"),
    ),
    measure,
    draw,
)
