"""How far E φ of an algorithm's steps is from E φ of its SDEs, over the learning rate. arXiv 2509.18001; orders: Li, Tai, E, 1811.01558.

No Monte Carlo on either side. On least squares the steps of unnormalised members are affine, and mean and second moments are closed forms.
On a torus the steps of all members are smooth and periodic, and E φ is propagated on a grid of all starts. The optimizers make the steps of
every mini-batch at every point of the grid.

Fixed before the runs: the problems, the members, TIME, COUNTS, RHO.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from bench.linear_models import Floats
from bench.papers.context import Context
from bench.papers.drift import order_of
from bench.papers.enumeration import Member, Steps, first_order
from bench.papers.experiment import Column, Experiment, Measured, cut, tune_axes
from bench.papers.fourier import Grid, after_diffusion, after_steps
from bench.papers.moments import affine, of_diffusion, of_steps
from bench.papers.small_problems import least_squares, torus

__all__ = ["COUNTS", "EXPERIMENT", "MODELS", "RHO", "on_least_squares", "on_torus"]

TIME = 1.0
COUNTS = (8, 16, 32, 64, 128)  # steps of η = TIME / count
RHO = 0.2
BATCH = 2
GRID = 17
LEAST_SQUARES, TORUS = "least squares", "torus"
UNNORMALISED = (Member("USAM", BATCH, 2, 0.0), Member("m-USAM, m = 1", BATCH, 1, 0.0), Member("n-USAM", BATCH, 6, 0.0))
MEMBERS = (
    Member("USAM", BATCH, 2, 0.0),
    Member("m-USAM, m = 1", BATCH, 1, 0.0),
    Member("SAM", BATCH, 2),
    Member("m-SAM, m = 1", BATCH, 1),
    Member("n-SAM", BATCH, 3),
    Member("RW-SAM, β = 1", BATCH, 2, beta=1.0),
    Member("RW-SAM, β = −1", BATCH, 2, beta=-1.0),
)


@dataclass(frozen=True)
class Model:
    """A diffusion in the place of the steps: ``order`` of its drift, whose drift and whose noise it has."""

    title: str
    order: int
    drift: str = "own"
    noise: str | None = "own"

    def drift_of(self, eta: float, parts: Mapping[str, tuple[Floats, Floats]]) -> Floats:
        """Order 1: -G, G the mean step at learning rate 1. Order 2: -G - η/2 (∂G) G, which is -∇(F + η/4 ‖∇F‖²) where G = ∇F.

        ``parts``: G and (∂G) G of ``own`` and of ``sgd``.
        """
        mean, bent = parts[self.drift]
        return -mean if self.order == 1 else -mean - eta / 2 * bent


MODELS = {
    "flow": Model("no noise, order 1", 1, noise=None),
    "order1": Model("SDE, order 1", 1),
    "sgd_noise": Model("SDE, order 2, SGD's noise", 2, noise="sgd"),
    "order2": Model("SDE, order 2", 2),
    "sgd": Model("SGD's SDE, order 2", 2, "sgd", "sgd"),
}


def on_torus(member: Mapping[str, Any], rho: float, counts: list[int], n: int) -> dict[str, Any]:
    """``errors``: of each of MODELS for each count, the largest |E φ(x_k) - E φ(X_T)| over all starts on the grid and four φ.

    ``truncated``: of the SDE of order 2 for the last count, with the drift to first order in ρ.
    """
    problem, grid, one = torus(), Grid(n), Member(**member)
    points, derivatives = torch.from_numpy(grid.points), grid.derivatives()

    def parts(steps: Floats) -> tuple[Floats, Floats, Floats]:  # (n², C, 2): G, (∂G) G and the covariance
        mean = steps.mean(1)
        jacobian = np.stack([each @ mean for each in derivatives], -1)
        rest = steps - mean[:, None]
        return mean, np.einsum("pij,pj->pi", jacobian, mean), np.einsum("pci,pcj->pij", rest, rest) / steps.shape[1]

    stepper = Steps(problem, one, rho)
    steps = np.stack([stepper(point).numpy() for point in points])
    plain, more = (found.numpy() for found in torch.func.vmap(first_order(problem, one))(points))
    x, y = grid.points.T
    phi = np.stack([np.cos(x), np.sin(y), np.cos(x - y), (plain.mean(1) ** 2).sum(1)], -1)
    own, sgd, cut_off = parts(steps), parts(plain), parts(plain + rho * more)
    drifts, noises = {"own": own[:2], "sgd": sgd[:2], "cut_off": cut_off[:2]}, {"own": own[2], "sgd": sgd[2], None: 0 * own[2]}
    wanted = {count: after_steps(grid, steps, TIME / count, count, phi) for count in counts}

    def error(model: Model, count: int) -> float:
        eta = TIME / count
        found = after_diffusion(grid, model.drift_of(eta, drifts), eta * noises[model.noise], TIME, phi)
        return cut(np.abs(found - wanted[count]).max(), 3)

    errors = {name: [error(model, count) for count in counts] for name, model in MODELS.items()}
    return {"errors": errors, "truncated": error(Model("", 2, "cut_off"), counts[-1])}


def on_least_squares(member: Mapping[str, Any], rho: float, counts: list[int]) -> dict[str, Any]:
    """As :func:`on_torus`, of the mean and the second moments: ‖E z z' - E Z Z'‖ / ‖E z z'‖ with z = (x, 1). Steps are affine in ρ too."""
    problem, one = least_squares(), Member(**member)
    start = problem.start.numpy()
    own, sgd = (affine(Steps(problem, one, radius), problem.start) for radius in (rho, 0.0))
    drifts = {name: (k.mean(0), k.mean(0) @ k.mean(0)) for name, k in (("own", own), ("sgd", sgd))}
    noises = {"own": own, "sgd": sgd, None: own[:1]}  # one outcome alone has no covariance
    wanted = {count: of_steps(own, TIME / count, count, start) for count in counts}

    def error(model: Model, count: int) -> float:
        eta = TIME / count
        found = of_diffusion(model.drift_of(eta, drifts), noises[model.noise], eta, TIME, start)
        return cut(float(np.linalg.norm(found - wanted[count]) / np.linalg.norm(wanted[count])), 3)

    return {"errors": {name: [error(model, count) for count in counts] for name, model in MODELS.items()}, "truncated": None}


def measure(context: Context) -> Measured:
    counts, n = ([16, 32, 64], 13) if context.quick else (list(COUNTS), GRID)
    linear = UNNORMALISED[:2] if context.quick else UNNORMALISED
    members = [each for each in MEMBERS if each.name in ("SAM", "RW-SAM, β = 1")] if context.quick else MEMBERS
    radii = [RHO] if context.quick else [RHO, RHO / 2]
    squares = context.map(on_least_squares, [{"member": asdict(each), "rho": RHO, "counts": counts} for each in linear], LEAST_SQUARES)
    jobs = [{"member": asdict(each), "rho": rho, "counts": counts, "n": n} for each in members for rho in radii]
    found = context.map(on_torus, jobs, TORUS)
    rows = [_row(LEAST_SQUARES, each, counts, one, None) for each, one in zip(linear, squares, strict=True)]
    for k, each in enumerate(members):
        own = found[k * len(radii) : (k + 1) * len(radii)]
        rows.append(_row(TORUS, each, counts, own[0], own[1]["truncated"] if len(own) > 1 else None))
    points = [point for row in rows for point in _points(row, counts)]
    for row in rows:
        row.pop("errors")
    settings = {"time": TIME, "steps": counts, "rho": RHO, "batch": BATCH, "grid": n}
    return Measured(settings, rows, points)


def _row(problem: str, member: Member, counts: list[int], found: Mapping[str, Any], at_half: float | None) -> dict[str, Any]:
    etas = [TIME / count for count in counts[-3:]]
    row: dict[str, Any] = {"problem": problem, "method": member.name, "errors": found["errors"]}
    for name in MODELS:
        row[name] = [found["errors"][name][-1], cut(order_of(etas, found["errors"][name][-3:]), 3)]
    return row | {"truncated": found["truncated"], "truncated_half": at_half}


def _points(row: Mapping[str, Any], counts: list[int]) -> Iterator[dict[str, Any]]:
    for name, errors in row["errors"].items():
        for count, error in zip(counts, errors, strict=True):
            yield {"problem": row["problem"], "method": row["method"], "model": name, "eta": TIME / count, "error": error}


def draw(measured: Measured) -> Figure:
    shown = ((LEAST_SQUARES, "m-USAM, m = 1"), (TORUS, "SAM"), (TORUS, "m-SAM, m = 1"), (TORUS, "RW-SAM, β = 1"))
    present = {(point["problem"], point["method"]) for point in measured.points}
    pairs = [pair for pair in shown if pair in present]
    figure = Figure(figsize=(2.5 * len(pairs) + 0.6, 3.6))
    styles = dict(zip(MODELS, (("#777777", "v"), ("#1f6f8b", "o"), ("#c9a227", "^"), ("#b05f3c", "s"), ("#bbbbbb", "x")), strict=True))
    axes = figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0]
    for axis, (problem, method) in zip(axes, pairs, strict=True):
        for name, (color, marker) in styles.items():
            points = [each for each in measured.points if (each["problem"], each["method"], each["model"]) == (problem, method, name)]
            etas, errors = [each["eta"] for each in points], [each["error"] for each in points]
            axis.plot(etas, errors, color=color, marker=marker, markersize=4, linewidth=1, label=MODELS[name].title)
        axis.set(xscale="log", yscale="log")
        axis.set_xlabel("learning rate η", fontsize=9)
        axis.set_title(f"{method}\n{problem}", fontsize=8)
    axes[0].set_ylabel("error of the SDE", fontsize=8)
    tune_axes(figure)
    figure.subplots_adjust(bottom=0.24)
    columns = len(styles) if len(pairs) > 3 else 2
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="lower center", ncols=columns)
    return figure


def _error(value: float) -> str:
    return f"{value:.1e}"


EXPERIMENT = Experiment(
    "How close the SDEs are",
    (
        Column("problem", "problem"),
        Column("method", "method"),
        *(Column(name, model.title, lambda pair: f"{pair[0]:.1e} ({pair[1]:.2f})") for name, model in MODELS.items()),
        Column("truncated", "order 2, R to first order in ρ", _error),
        Column("truncated_half", "the same, half of ρ", _error),
    ),
    measure,
    draw,
)
