"""f(x) = Σ log(1 + (Ax - b)_i²), not convex: SAM with a constant and an almost constant radius, and gradient descent. arXiv 2401.08060."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench import batched
from bench.linear_models import Floats, LinearModels
from bench.papers.context import Context
from bench.papers.experiment import COMPARED, Column, Experiment, Measured, compare, curve, cut, look, together, tune_axes

__all__ = ["EXPERIMENT", "WAYS", "make_models", "piece"]

SIZES = (2, 20, 50, 100)
INSTANCES = 10
BLOCK = 5  # instances of a piece
RHO = 0.1
SLOW, FAST = 0.001, 0.5  # powers p of radii C / k^p
HALF = 1000  # t_k = 1 / (L (1 + k / HALF)): as 1 / k in the end, and no shorter than half of 1 / L for as many steps
# Learning rate, radius.
WAYS = {
    "gradient": ("1 / L", "0 (gradient descent)"),
    "constant": ("1 / L", "ρ"),
    "slow": ("1 / L", "ρ / k^0.001"),
    "fast": ("1 / L", "ρ / k^0.5"),
    "diminishing_gradient": ("diminishing", "0 (gradient descent)"),
    "diminishing_constant": ("diminishing", "ρ"),
    "diminishing": ("diminishing", "ρ / k^0.001"),
}


def make_models(n: int, first: int = 0, last: int = INSTANCES) -> LinearModels:
    """Those of INSTANCES from ``first`` to before ``last``: A (n, n) and b standard normal. f is 0 at its minimum, and has other
    stationary points."""
    generator = np.random.default_rng(n)
    a, b = generator.standard_normal((INSTANCES, n, n)), generator.standard_normal((INSTANCES, n))
    return LinearModels("log", a[first:last], b[first:last], weight=1.0)


def steps_of(models: LinearModels) -> batched.Steps:
    """Of the runs WAYS, in this order. L = 2 ‖A‖²."""
    smoothness = 2 * np.linalg.norm(models.a, 2, axis=(1, 2))[:, None] ** 2  # (streams, 1)
    diminishes = np.array([way.startswith("diminishing") for way in WAYS])
    powers = np.array([SLOW if radius.endswith("0.001") else FAST if radius.endswith("0.5") else 0.0 for _, radius in WAYS.values()])
    radii = np.array([0.0 if radius.startswith("0") else RHO for _, radius in WAYS.values()])

    def rho(k: int) -> Floats:
        return np.asarray(radii / k**powers)

    def gamma(k: int) -> Floats:
        return np.asarray(np.where(diminishes, 1 / (1 + k / HALF), 1.0) / smoothness)

    return batched.Steps(rho, 1.0, gamma)


def piece(n: int, first: int, last: int, times: Sequence[int], compared: int) -> dict[str, Any]:
    """``seen``: ‖∇f‖ and f of the instances from ``first`` to before ``last``, (times, 2, instances, ways); ``compared``: with the
    optimizer, a run of every way for so many steps."""
    models = make_models(n, first, last)
    start, steps = np.zeros((models.streams, len(WAYS), n)), steps_of(models)
    checked = compare(models, start, [None] * compared, steps, len(WAYS))

    def see(x: Floats) -> Floats:
        return np.stack([models.gradient_norms(x), models.f(x)])

    seen = look(models, start, (None for _ in range(times[-1])), steps, times, see)
    return {"seen": seen.tolist(), "compared": checked}


def measure(context: Context) -> Measured:
    number = 500 if context.quick else 30_000
    times = batched.times_of(number, 120)
    settings: dict[str, Any] = {"steps": number, "instances": INSTANCES}
    sizes = SIZES[:2] if context.quick else SIZES
    jobs = [{"n": n, "first": first, "last": first + BLOCK} for n in sizes for first in range(0, INSTANCES, BLOCK)]
    size = {"times": times, "compared": COMPARED[context.quick]}
    pieces = dict(zip([(job["n"], job["first"]) for job in jobs], context.map(piece, [job | size for job in jobs], "log"), strict=True))
    rows, points = [], []
    for n in sizes:
        parts = [pieces[n, first] for first in range(0, INSTANCES, BLOCK)]
        settings[f"n_{n}"] = together([part["compared"] for part in parts])
        found = np.concatenate([np.array(part["seen"]) for part in parts], axis=2)  # (times, 2, instances, ways)
        norms, values = np.median(found, axis=2).swapaxes(0, 1)
        late = np.array(times) >= 0.8 * times[-1]
        for k, (way, (rate, radius)) in enumerate(WAYS.items()):
            ends = np.sqrt((found[late, 0, :, k] ** 2).mean(0))  # (instances,): a cycle has many norms
            rows.append(
                {
                    "n": n,
                    "way": way,
                    "rate": rate,
                    "radius": radius,
                    "gradient_norm": cut(float(np.median(ends))),
                    "least": cut(float(ends.min())),
                    "largest": cut(float(ends.max())),
                    "f": cut(float(values[late, k].mean())),
                }
            )
            points += curve({"n": n, "way": way}, times, gradient_norm=norms[:, k], f=values[:, k])
    return Measured(settings, rows, points)


def draw(measured: Measured) -> Figure:
    sizes = sorted({row["n"] for row in measured.rows})
    figure = Figure(figsize=(3.2 * len(sizes), 5.6))
    axes = figure.subplots(2, len(sizes), squeeze=False)
    colors = dict(zip(WAYS, ("#444444", "#b05f3c", "#d8a583", "#c9a227", "#9a9a9a", "#7f9aa8", "#1f6f8b"), strict=True))
    for column, n in enumerate(sizes):
        for line, (key, label) in enumerate((("gradient_norm", "‖∇f‖"), ("f", "f"))):
            axis = axes[line][column]
            for way, (rate, radius) in WAYS.items():
                shown = [point for point in measured.points if point["n"] == n and point["way"] == way and point["step"] > 0]
                style = "--" if way.startswith("diminishing") else "-"
                heights = [point[key] for point in shown]
                axis.plot([point["step"] for point in shown], heights, style, color=colors[way], label=f"{rate}; {radius}", linewidth=1.2)
            axis.set(xscale="log", yscale="log", xlabel="step")
            axis.set_ylim(bottom=1e-10 if n == min(SIZES) else None)  # gradient descent goes on to the last bit
            axis.set_title(f"n = {n}: {label}", fontsize=9)
    axes[0][0].legend(fontsize=6.5, frameon=False)
    return tune_axes(figure)


def _short(value: float) -> str:
    return f"{value:.2g}"


EXPERIMENT = Experiment(
    "A function that is not convex",
    (
        Column("n", "n"),
        Column("rate", "learning rate"),
        Column("radius", "radius"),
        Column("gradient_norm", "‖∇f‖ at the end, median", _short),
        Column("least", "least", _short),
        Column("largest", "largest", _short),
        Column("f", "f, median", _short),
    ),
    measure,
    draw,
)
