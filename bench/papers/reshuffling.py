"""Unified SAM on reshuffled data against fresh draws: where constant steps stay, and how that scales with the learning rate.

Ridge regression, n = 100, d = 10, batches of 10, float64. Learning rates γ: STEPS times that of ``theory.reshuffling_steps`` at λ = 0.
Radii: the largest that theory admits for every sampling, the same for all γ, or in proportion to γ. A run begins at the minimum and makes
2 SETTLING / (γ μ) steps. Its floor is the mean of f - f* at the ends of epochs in the second half. (From the minimum: the transient of any
other start falls as exp(-2 γ μ t), and reshuffled floors are so low that it would show for most of the run.) Exponents are fitted, seed by
seed, to the last FITTED learning rates.

"First order" is docs/reshuffling.md's mean drift of an epoch: the minimum moves to where ∇f = -w, so f - f* = w' (∇²f)^-1 w / 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice, product
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench import batched
from bench.importance.problem import RIDGE, Ridge
from bench.linear_models import Draw, Floats
from bench.papers.context import Context
from bench.papers.experiment import COMPARED, Column, Experiment, Measured, compare, cut, tune_axes
from sam_kernels import theory

__all__ = ["EXPERIMENT", "LAMBDS", "RADII", "SAMPLINGS", "batches", "bound_of", "first_order", "make_problem", "radius_of"]

N, D, TAU = 100, 10, 10
M = N // TAU  # batches of an epoch
SAMPLINGS = {"reshuffled": "reshuffled", "once": "shuffled once", "tau_nice": "τ-nice", "with_replacement": "with replacement"}
LAMBDS = (0.0, 0.5, 1.0)
RADII = {"fixed": "fixed", "proportional": "∝ γ"}
RUNS = list(product(LAMBDS, RADII))
STEPS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25)
FITTED = 4
SEEDS = 20
PARTS = 2  # of the seeds, a run each
SETTLING = 10.0
PERMUTATIONS = 4000  # for the mean direction of normalised ascents, the one number of the formula that has no closed form


def make_problem() -> Ridge:
    """Eigenvalues of A'A / n from 1 to 4, evenly on a logarithmic scale; b is the image of a point plus standard normal noise."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(rows, D, generator=generator, dtype=torch.float64))[0] for rows in (N, D))
    a = math.sqrt(N) * u * torch.logspace(0, math.log10(4), D, dtype=torch.float64).sqrt() @ v.T
    point, noise = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (D, N))
    return Ridge(a, a @ point + noise)


def constants_of(problem: Ridge, sampling: str) -> dict[str, float]:
    """μ, L, A, B and C. Shuffled once, the batches are given: ‖∇f_S‖² ≤ 2 L (f_S - f_S,inf), and f_S,inf ≥ 0."""
    options: dict[str, Any] = {"n": N, "L": problem.smoothness, "tau": TAU}
    name = "with_replacement" if sampling == "with_replacement" else "tau_nice"
    L = theory.sampled_smoothness(name, **options)
    if sampling == "once":
        return {"mu": problem.mu, "L": L, "A": L, "B": 0.0, "C": 2 * L * problem.f_inf}
    A, B = theory.expected_residual(name, **options)
    return {"mu": problem.mu, "L": L, "A": A, "B": B, "C": theory.residual_constant(A, problem.f_inf, problem.mean_f_i_inf)}


def admitted(problem: Ridge, sampling: str, lambd: float) -> tuple[float, float]:
    """(ρ, γ) of theory."""
    c = constants_of(problem, sampling)
    known = (c["mu"], c["L"], c["A"], c["B"], lambd)
    if sampling in ("reshuffled", "once"):
        return theory.reshuffling_steps(*known, M, "random" if sampling == "reshuffled" else "any")
    return theory.pl_constant_steps(*known)


def radius_of(problem: Ridge, lambd: float, radii: str, step: float) -> float:
    """The radius of the learning rate STEPS[...] = ``step``."""
    return min(admitted(problem, sampling, lambd)[0] for sampling in SAMPLINGS) * (step if radii == "proportional" else 1.0)


def bound_of(problem: Ridge, sampling: str, lambd: float, rho: float, gamma: float) -> float | None:
    """The floor by theory; None for steps that it does not admit."""
    c = constants_of(problem, sampling)
    if sampling in ("reshuffled", "once"):
        try:
            order = "random" if sampling == "reshuffled" else "any"
            return theory.reshuffling_floor(**c, lambd=lambd, rho=rho, gamma=gamma, batches=M, order=order)
        except ValueError:
            return None
    largest_rho, largest_gamma = admitted(problem, sampling, lambd)
    if rho > largest_rho or gamma > largest_gamma:
        return None
    return theory.pl_floor(c["mu"], c["L"], c["C"], lambd, rho, gamma)


def drifts(problem: Ridge) -> tuple[Tensor, Tensor]:
    """(d,) both, at the minimum and over batches S: E[H_S G_S], E[H_S G_S / ‖G_S‖]; G_S the gradient of f_S, H_S its Hessian."""
    residuals = problem.a @ problem.minimum - problem.b
    gradients = residuals[:, None] * problem.a + RIDGE * problem.minimum
    own = (problem.a * (problem.a * gradients).sum(1, keepdim=True) + RIDGE * gradients).mean(0)  # E over samples
    samples = np.tile(np.arange(N), (PERMUTATIONS, 1))
    total = torch.zeros(D, dtype=torch.float64)
    for rows in torch.from_numpy(np.random.default_rng(0).permuted(samples, axis=1)).split(TAU, 1):
        g = gradients[rows].mean(1)
        curved = torch.einsum("std,st->sd", problem.a[rows], torch.einsum("std,sd->st", problem.a[rows], g)) / TAU + RIDGE * g
        total += (curved / g.norm(dim=1, keepdim=True)).mean(0)
    # The gradients sum to 0: pairs of different samples have the mean -own / (n - 1).
    return own * (N - TAU) / (TAU * (N - 1)), total / M


def first_order(problem: Ridge, plain: Tensor, normalised: Tensor, lambd: float, rho: float, gamma: float) -> float:
    """f - f* where reshuffled epochs do not move on the mean; ``plain`` and ``normalised`` of :func:`drifts`."""
    hessian = problem.a.T @ problem.a / N + RIDGE * torch.eye(D, dtype=torch.float64)
    w = (rho * (1 - lambd) + gamma / 2) * plain + rho * lambd * normalised
    return (w @ torch.linalg.solve(hessian, w)).item() / 2


def batches(sampling: str, streams: int, generator: np.random.Generator) -> Iterator[Draw]:
    """Without end: (streams, TAU) samples of each step, each stream with draws of its own."""
    weights = np.full((streams, TAU), 1 / TAU)
    samples = np.tile(np.arange(N), (streams, M, 1))
    once = generator.permuted(samples[:, 0], axis=1)
    while True:
        if sampling == "with_replacement":
            epoch = generator.integers(0, N, (streams, M, TAU))
        elif sampling == "tau_nice":
            epoch = generator.permuted(samples, axis=2)[..., :TAU]
        else:
            order = once if sampling == "once" else generator.permuted(samples[:, 0], axis=1)
            epoch = order.reshape(streams, M, TAU)
        yield from ((epoch[:, j], weights) for j in range(M))


def every_batch(streams: int, seed: int) -> Iterator[Draw]:
    """Of all samplings, ``streams`` of each in the order of SAMPLINGS."""
    each = [batches(name, streams, np.random.default_rng([seed, k])) for k, name in enumerate(SAMPLINGS)]
    for drawn in zip(*each, strict=True):
        yield np.concatenate([rows for rows, _ in drawn]), np.concatenate([weights for _, weights in drawn])  # type: ignore[misc]


def plan(problem: Ridge, step: float) -> tuple[batched.Steps, float]:
    """Of the runs RUNS; and γ."""
    gamma = step * admitted(problem, "reshuffled", 0.0)[1]
    rho = np.array([radius_of(problem, lambd, radii, step) for lambd, radii in RUNS])
    return batched.Steps(rho, np.array([lambd for lambd, _ in RUNS]), np.asarray(gamma)[None]), gamma


def floors(step: float, streams: int, seed: int, settling: float) -> dict[str, Any]:
    """(samplings, streams, runs): the means of f - f* where the steps stay."""
    problem = make_problem()
    steps, gamma = plan(problem, step)
    models = problem.models(len(SAMPLINGS) * streams)
    epochs = math.ceil(settling / (gamma * problem.mu * M))
    start = np.broadcast_to(problem.minimum.numpy(), (models.streams, len(RUNS), D))
    total = np.zeros((models.streams, len(RUNS)))
    draws = islice(every_batch(streams, seed), 2 * epochs * M)
    for t, x in enumerate(batched.trajectories(models, start, draws, steps), 1):
        if t % M == 0 and t > epochs * M:
            total += models.f(x) - problem.f_inf
    return {"floors": (total / epochs).reshape(len(SAMPLINGS), streams, len(RUNS)).tolist()}


def measure(context: Context) -> Measured:
    streams, settling = (2, 0.1) if context.quick else (SEEDS // PARTS, SETTLING)
    problem = make_problem()
    settings: dict[str, Any] = {"n": N, "d": D, "tau": TAU, "mu": problem.mu, "seeds": PARTS * streams, "settling": settling}
    for step in (STEPS[0], STEPS[-1]):
        models = problem.models(len(SAMPLINGS))
        start = np.broadcast_to(problem.minimum.numpy(), (models.streams, len(RUNS), D))
        drawn = list(islice(every_batch(1, 0), COMPARED[context.quick]))
        settings[f"step_{step:g}"] = compare(models, start, drawn, plan(problem, step)[0], len(RUNS))
    jobs = [{"step": step, "streams": streams, "seed": seed, "settling": settling} for step in reversed(STEPS) for seed in range(PARTS)]
    made = context.map(floors, jobs, "reshuffling")
    # (steps, samplings, seeds, runs), the longest steps first.
    found = np.array([[run["floors"] for run in made[k : k + PARTS]] for k in range(0, len(made), PARTS)])[::-1]
    found = found.swapaxes(1, 2).reshape(len(STEPS), len(SAMPLINGS), -1, len(RUNS))
    gammas = np.array([plan(problem, step)[1] for step in STEPS])
    settings["gamma"] = [cut(gamma) for gamma in gammas]
    formula = drifts(problem)
    rows, points = [], []
    for (k, (lambd, radii)), (s, sampling) in product(enumerate(RUNS), enumerate(SAMPLINGS)):
        one = found[:, s, :, k]  # (steps, seeds)
        exponents = np.polyfit(np.log(gammas[-FITTED:]), np.log(one[-FITTED:]), 1)[0]
        series = {"radii": radii, "lambd": lambd, "sampling": sampling}
        for step, gamma, values in zip(STEPS, gammas, one, strict=True):
            rho = radius_of(problem, lambd, radii, step)
            predicted = cut(first_order(problem, *formula, lambd, rho, gamma)) if sampling == "reshuffled" else None
            found_here = {"floor": cut(values.mean()), "error": cut(_error(values)), "first_order": predicted}
            points.append({**series, "gamma": cut(gamma), "rho": cut(rho), **found_here})
        bound = bound_of(problem, sampling, lambd, rho, gamma)
        rows.append(
            {
                **series,
                "first": cut(one[0].mean()),
                "last": cut(one[-1].mean()),
                "last_error": cut(_error(one[-1])),
                "exponent": [cut(exponents.mean()), cut(_error(exponents))],
                "first_order": predicted,
                "bound": None if bound is None else cut(bound),
            }
        )
    rows.sort(key=lambda row: list(RADII).index(row["radii"]))
    return Measured(settings, rows, points)


def _error(values: Floats) -> float:
    """The standard error of the mean."""
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def draw(measured: Measured) -> Figure:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(9.6, 4.6))
    axes = figure.subplots(1, 2, sharey=True)
    colors = dict(zip(SAMPLINGS, ("#b05f3c", "#c9a227", "#1f6f8b", "#444444"), strict=True))
    marks = dict(zip(SAMPLINGS, "osv^", strict=True))
    styles = {0.0: "-", 1.0: "--"}
    for axis, (radii, title) in zip(axes, {"fixed": "ρ the same for all γ", "proportional": "ρ in proportion to γ"}.items(), strict=True):
        for (lambd, style), sampling in product(styles.items(), SAMPLINGS):
            chosen = {"radii": radii, "lambd": lambd, "sampling": sampling}
            shown = [point for point in measured.points if chosen.items() <= point.items()]
            x, y, predicted = ([point[key] for point in shown] for key in ("gamma", "floor", "first_order"))
            axis.plot(x, y, style, color=colors[sampling], marker=marks[sampling], markersize=4, linewidth=1.2)
            if predicted[0] is not None:
                axis.plot(x, predicted, ":", color="black", linewidth=1.2)
        axis.set(xscale="log", yscale="log", xlabel="learning rate γ", ylim=(1e-9, 1e-2))
        axis.set_xticks([2e-4, 5e-4, 1e-3, 2e-3, 5e-3], ["0.0002", "0.0005", "0.001", "0.002", "0.005"])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel("f − f* where steps stay")
    handles = [Line2D([], [], color=colors[name], marker=marks[name], markersize=4, label=label) for name, label in SAMPLINGS.items()]
    handles += [Line2D([], [], color="#888888", linestyle=style, label=f"λ = {lambd:g}") for lambd, style in styles.items()]
    handles.append(Line2D([], [], color="black", linestyle=":", label="reshuffled, first order"))
    axes[0].legend(handles=handles, fontsize=8, frameon=False, loc="lower right", ncol=2)
    return tune_axes(figure)


def _short(value: float) -> str:
    return f"{value:.2g}"


EXPERIMENT = Experiment(
    "Reshuffled data",
    (
        Column("radii", "ρ", lambda value: RADII[value]),
        Column("lambd", "λ", lambda value: f"{value:g}"),
        Column("sampling", "sampling", lambda value: SAMPLINGS[value]),
        Column("first", "floor of f − f*, longest γ", _short),
        Column("last", "shortest γ", _short),
        Column("exponent", "exponent in γ", lambda value: f"{value[0]:.2f} ± {value[1]:.2f}"),
        Column("first_order", "first order, shortest γ", _short),
        Column("bound", "bound, shortest γ", _short),
    ),
    measure,
    draw,
)
