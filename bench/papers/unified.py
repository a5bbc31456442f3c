"""Unified SAM at the steps that theory gives, λ = 0, 0.1, …, 1: constant against decreasing, uniform against importance sampling.

Least squares with all the data and ridge regression with batches drawn with replacement, n = d = 100. arXiv 2503.02225.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product, repeat
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from bench import batched
from bench.importance.problem import N, Ridge, make_problem, rows_of
from bench.importance.run import draws
from bench.linear_models import Draw, Floats, LinearModels
from bench.papers.context import Context
from bench.papers.experiment import COMPARED, Column, Experiment, Measured, compare, curve, cut, look, together, tune_axes
from sam_kernels import theory
from sam_kernels.sampling import ImportanceSampler

__all__ = ["EXPERIMENT", "LAMBDS", "PUBLISHED", "bounds", "constants_of", "least_squares", "piece"]

LAMBDS = tuple(k / 10 for k in range(11))
KINDS = ("constant", "decreasing")
MU, L = 0.1, 10.0  # of least squares
TAU = 10  # draws of a batch
# (ρ, γ) of least squares by λ, form 1: what the paper's code prints.
PUBLISHED = {0.0: (0.0166667, 0.0236842), 0.5: (0.0333333, 0.0236842), 1.0: (0.05, 0.025)}
SAMPLINGS = ("full", "uniform", "importance")
SEEDS = 2  # of ridge regression
RUNS = tuple(product(KINDS, LAMBDS))


@dataclass(frozen=True)
class Constants:
    """What theory needs to know of a problem and a way of sampling."""

    mu: float
    L: float
    A: float
    B: float
    C: float


def least_squares(seed: int = 0) -> tuple[LinearModels, Constants]:
    """Eigenvalues of the Hessian between μ and L, both among them, evenly on a logarithmic scale; one point fits all samples: f* = 0."""
    generator = torch.Generator().manual_seed(seed)
    a = rows_of(torch.logspace(np.log10(MU), np.log10(L), N, dtype=torch.float64), generator, mixed=True)
    b = a @ torch.randn(N, generator=generator, dtype=torch.float64)
    A, B = theory.expected_residual("full", n=N, L=L)
    return LinearModels("squares", a.numpy()[None], b.numpy()[None]), Constants(MU, L, A, B, 0.0)


def constants_of(problem: Ridge, probabilities: Tensor) -> Constants:
    """Of ridge regression by batches of TAU draws."""
    sampling: dict[str, Any] = {"n": N, "L": problem.smoothness, "tau": TAU, "probabilities": probabilities}
    A, B = theory.expected_residual("with_replacement", **sampling)
    smoothness = theory.sampled_smoothness("with_replacement", **sampling)
    return Constants(problem.mu, smoothness, A, B, theory.residual_constant(A, problem.f_inf, problem.mean_f_i_inf))


def schedule(by_stream: Sequence[Constants], runs: Sequence[tuple[str, float]]) -> batched.Steps:
    """(streams, runs) steps of theory: :func:`theory.pl_decreasing_steps`, or the constant ones they begin with."""
    constant = np.array([[theory.pl_constant_steps(c.mu, c.L, c.A, c.B, lambd) for _, lambd in runs] for c in by_stream])
    rho, gamma = constant[..., 0], constant[..., 1]
    is_constant = np.array([kind == "constant" for kind, _ in runs])
    mu = np.array([c.mu for c in by_stream])[:, None]

    def rho_at(t: int) -> Floats:  # theory counts from 0
        return np.where(is_constant, rho, np.minimum(rho, 1 / (2 * t - 1)))

    def gamma_at(t: int) -> Floats:
        return np.where(is_constant, gamma, np.minimum(gamma, (2 * t - 1) / (t * t * mu)))

    return batched.Steps(rho_at, np.array([lambd for _, lambd in runs]), gamma_at)


def bounds(c: Constants, kind: str, lambd: float, gap: float, times: Sequence[int]) -> list[float]:
    """On E[f - f*] at ``times``. With constant steps :func:`theory.pl_bound`.

    With decreasing steps that bound from each time to the next: a step takes a share γ_t μ of what is above the floor of (ρ_t, γ_t), which
    are at most those at the beginning and at least those at the end.
    """
    if kind == "constant":
        rho, gamma = theory.pl_constant_steps(c.mu, c.L, c.A, c.B, lambd)
        return [theory.pl_bound(t, gap, c.mu, c.L, c.C, lambd, rho, gamma) for t in times]
    found = [gap]
    for start, end in pairwise(times):
        first, last = (theory.pl_decreasing_steps(t, c.mu, c.L, c.A, c.B, lambd) for t in (start, end - 1))
        floor = theory.pl_floor(c.mu, c.L, c.C, lambd, *first)
        found.append(floor + (1 - last[1] * c.mu) ** (end - start) * max(0.0, found[-1] - floor))
    return found


def samplers_of(problem: Ridge) -> dict[str, ImportanceSampler]:
    return {"uniform": ImportanceSampler(lipschitz=torch.ones(N)), "importance": ImportanceSampler(lipschitz=problem.smoothness)}


def constants(sampling: str) -> Constants:
    if sampling == "full":
        return least_squares()[1]
    problem = make_problem("mixed")
    return constants_of(problem, samplers_of(problem)[sampling].probabilities)


def batches(sampling: str, number: int) -> Iterator[Draw]:
    """Of as many steps: all the data, or those of SEEDS streams. Each sampler has a generator of its own."""
    if sampling == "full":
        yield from repeat(None, number)
        return
    samplers = samplers_of(make_problem("mixed"))
    first = SEEDS * list(samplers).index(sampling)
    for draw in draws(list(samplers.values()), SEEDS, number, TAU):
        assert draw is not None
        yield draw[0][first : first + SEEDS], draw[1][first : first + SEEDS]


def piece(sampling: str, times: Sequence[int], compared: int) -> dict[str, Any]:
    """``gaps``: f - f* at each of the times, of each of RUNS, mean of the seeds; ``compared``: with the optimizer, so many steps."""
    if sampling == "full":
        models, lowest = least_squares()[0], 0.0
    else:
        problem = make_problem("mixed")
        models, lowest = problem.models(SEEDS), problem.f_inf
    start, steps = np.zeros((models.streams, len(RUNS), N)), schedule([constants(sampling)] * models.streams, RUNS)
    checked = compare(models, start, list(batches(sampling, compared)), steps, 6)
    gaps = look(models, start, batches(sampling, times[-1]), steps, times, lambda x: models.f(x) - lowest)
    return {"gaps": gaps.mean(1).tolist(), "compared": checked}


def measure(context: Context) -> Measured:
    full_steps, ridge_steps = (300, 300) if context.quick else (20_000, 150_000)
    settings: dict[str, Any] = {"steps_full": full_steps, "steps_ridge": ridge_steps, "tau": TAU, "seeds": SEEDS}
    times = {sampling: batched.times_of(full_steps if sampling == "full" else ridge_steps, 120) for sampling in SAMPLINGS}
    # The longest first.
    jobs = [{"sampling": sampling, "times": times[sampling], "compared": COMPARED[context.quick]} for sampling in reversed(SAMPLINGS)]
    found = dict(zip(reversed(SAMPLINGS), context.map(piece, jobs, "unified"), strict=True))
    settings["full"] = found["full"]["compared"]
    settings["ridge"] = together([found[sampling]["compared"] for sampling in SAMPLINGS[1:]])
    rows: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    for sampling in SAMPLINGS:
        more = _rows(sampling, constants(sampling), RUNS, times[sampling], np.array(found[sampling]["gaps"]))
        rows, points = rows + more[0], points + more[1]
    return Measured(settings, rows, points)


def _rows(
    sampling: str, c: Constants, runs: Sequence[tuple[str, float]], times: Sequence[int], gaps: Floats
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    late = np.array(times) >= 0.8 * times[-1]
    for lambd in LAMBDS:
        rho, gamma = theory.pl_constant_steps(c.mu, c.L, c.A, c.B, lambd)
        row: dict[str, Any] = {"sampling": sampling, "lambd": lambd, "rho": rho, "gamma": gamma}
        row["floor"] = cut(theory.pl_floor(c.mu, c.L, c.C, lambd, rho, gamma))
        for kind in KINDS:
            gap = gaps[:, runs.index((kind, lambd))]
            bound = np.array(bounds(c, kind, lambd, float(gap[0]), times))
            row[kind] = cut(_mean(gap, late))
            row[f"share_{kind}"] = cut(float((gap / bound).max()))
            points += curve({"sampling": sampling, "steps": kind, "lambd": lambd}, times, gap=gap, bound=bound)
        rows.append(row)
    return rows, points


def _mean(values: Floats, where: NDArray[np.bool_]) -> float:
    return max(0.0, float(values[where].mean()))


def draw(measured: Measured) -> Figure:
    from matplotlib import colormaps

    figure = Figure(figsize=(11.0, 6.2))
    axes = figure.subplots(2, 3)
    titles = ("least squares, all the data", "ridge, uniform", "ridge, importance")
    for column, sampling in enumerate(SAMPLINGS):
        for line, kind in enumerate(KINDS):
            axis = axes[line][column]
            for lambd in (0.0, 0.3, 0.5, 0.7, 0.9, 1.0):
                chosen = {"sampling": sampling, "steps": kind, "lambd": lambd}
                shown = [point for point in measured.points if point["step"] > 0 and chosen.items() <= point.items()]
                color, times = colormaps["viridis"](0.9 * lambd), [point["step"] for point in shown]
                axis.plot(times, [point["gap"] for point in shown], color=color, label=f"λ = {lambd:g}")
                axis.plot(times, [point["bound"] for point in shown], color=color, linestyle="--", linewidth=0.8)
            axis.set(xscale="log", yscale="log", xlabel="step", ylabel="f(x) − f*")
            axis.set_ylim(bottom=1e-10 if sampling == "full" else None)  # λ = 0 goes on to the last bit
            axis.set_title(f"{titles[column]}: {kind} steps", fontsize=9)
    axes[0][0].legend(fontsize=7, frameon=False)
    return tune_axes(figure)


def _short(value: float) -> str:
    return f"{value:.2g}"


EXPERIMENT = Experiment(
    "Unified SAM at the steps of its theory",
    (
        Column("sampling", "sampling"),
        Column("lambd", "λ", lambda value: f"{value:g}"),
        Column("rho", "ρ", _short),
        Column("gamma", "γ", _short),
        Column("floor", "floor: bound", _short),
        Column("constant", "f − f*, constant steps", _short),
        Column("share_constant", "largest share of its bound", _short),
        Column("decreasing", "f − f*, decreasing steps", _short),
        Column("share_decreasing", "largest share of its bound", _short),
    ),
    measure,
    draw,
)
