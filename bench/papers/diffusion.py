"""The mean and the covariance of a step over every mini-batch, against the drift and the diffusion of the SDEs. arXiv 2509.18001.

Fixed before the runs: MEMBERS, the radii of :mod:`bench.papers.drift`, one problem for the optimizers, OTHERS more for the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bench.papers.context import Context
from bench.papers.drift import RADII, order_of
from bench.papers.enumeration import Member, Steps, covariance, first_order
from bench.papers.experiment import Column, Experiment, Measured, cut, tune_axes
from bench.papers.small_problems import Problem

__all__ = ["EXPERIMENT", "MEMBERS", "asymmetry", "measured", "of_pieces"]

BATCH = 4
OTHERS = 20  # problems, seeds 1, 2, …
MEMBERS = (
    Member("USAM", BATCH, 4, 0.0),
    Member("m-USAM, m = 2", BATCH, 2, 0.0),
    Member("m-USAM, m = 1", BATCH, 1, 0.0),
    Member("n-USAM", BATCH, Problem.count, 0.0),
    Member("SAM", BATCH, 4),
    Member("m-SAM, m = 2", BATCH, 2),
    Member("m-SAM, m = 1", BATCH, 1),
    Member("n-SAM", BATCH, Problem.count),
    Member("RW-SAM, β = 1", BATCH, 4, beta=1.0),
    Member("RW-SAM, β = −1", BATCH, 4, beta=-1.0),
)


def asymmetry(problem: Problem, member: Member) -> float:
    """‖(J - J')/2‖ / ‖J‖ of the Jacobian J of r, the drift's part of first order: 0 where r is the gradient of a scalar."""
    field = first_order(problem, member)
    jacobian: Tensor = torch.func.jacrev(lambda x: field(x)[1].mean(0))(problem.start)
    return ((jacobian - jacobian.T) / 2).norm().item() / jacobian.norm().item()


def of_pieces(problem: Problem, member: Member, rho: float) -> Tensor:
    """(d, d): the paper's diffusion (m / |S|) Σ^m, Σ^m the covariance of the step of one piece, for pieces without replacement.

    The factor (N - |S|) / (N - m) is right for the noise of SGD, which is all that is left for ρ → 0.
    """
    steps = Steps(problem, Member(member.name, member.m, member.m, member.lambd), rho)(problem.start)
    n, size, m = problem.count, member.batch, member.m
    return covariance(steps, steps) * m / size * (n - size) / (n - m)


def slope(problem: Problem, member: Member) -> float:
    """d log tr Σ / dρ at ρ = 0, to first order: 2 tr cov(∇f_S, r) / tr cov(∇f_S)."""
    plain, more = first_order(problem, member)(problem.start)
    return (2 * covariance(plain, more).trace() / covariance(plain, plain).trace()).item()


def measured(member: Mapping[str, Any], others: int) -> dict[str, Any]:
    """The row of one member. Errors: one for each of RADII."""
    problem, one = Problem(), Member(**member)
    plain, more = first_order(problem, one)(problem.start)  # (C, d) each
    sgd, cross = covariance(plain, plain), covariance(plain, more)
    cuts_the_batch = one.m < one.batch
    found: dict[str, list[float]] = {"drift": [], "diffusion": [], "rest": [], "pieces": [], "trace": []}
    for rho in RADII:
        steps = Steps(problem, one, rho)(problem.start)
        noise = covariance(steps, steps)
        left = (steps - plain).mean(0) / rho - more.mean(0)
        found["drift"].append(left.norm().item() / more.mean(0).norm().item())
        found["diffusion"].append((noise - sgd).norm().item() / sgd.norm().item())
        found["rest"].append((noise - sgd - rho * (cross + cross.T)).norm().item() / sgd.norm().item())
        found["trace"].append((noise.trace() / sgd.trace()).item())
        if cuts_the_batch:
            found["pieces"].append((of_pieces(problem, one, rho) - noise).norm().item() / noise.norm().item())
    problems = [Problem(seed) for seed in range(1, 1 + others)]
    slopes, of_batch = ([slope(each, other) for each in problems] for other in (one, Member("", one.batch, one.batch, one.lambd)))
    return {
        "method": one.name,
        "m": one.m,
        **{f"error_{k}": cut(error, 3) for k, error in enumerate(found["drift"], 1)},
        "order": cut(order_of(RADII[1:], found["drift"][1:]), 4),  # at 0.1 the next orders show, here and below
        "asymmetry": cut(asymmetry(problem, one), 2),
        "trace": cut(found["trace"][0]),
        "slope": cut((found["trace"][-1] - 1) / RADII[-1], 3),
        "formula": cut(slope(problem, one), 3),
        "others": [cut(min(slopes), 2), cut(max(slopes), 2)],
        "above_batch": sum(mine > whole for mine, whole in zip(slopes, of_batch, strict=True)),
        "order_noise": cut(order_of(RADII[1:], found["diffusion"][1:]), 4),
        "order_rest": cut(order_of(RADII[1:], found["rest"][1:]), 4),
        "pieces": [cut(error, 2) for error in found["pieces"]] or None,
        "curves": {key: [cut(value, 3) for value in found[key]] for key in ("drift", "diffusion", "rest")},
    }


def measure(context: Context) -> Measured:
    members = MEMBERS[4::2] if context.quick else MEMBERS
    others = 2 if context.quick else OTHERS
    rows = context.map(measured, [{"member": asdict(member), "others": others} for member in members], "diffusion")
    points = []
    for row in rows:
        curves = row.pop("curves")
        points += [
            {"method": row["method"], "rho": rho, **{key: values[k] for key, values in curves.items()}} for k, rho in enumerate(RADII)
        ]
    return Measured({"samples": Problem.count, "batch": BATCH, "radii": list(RADII), "others": others}, rows, points)


def draw(measured: Measured) -> Figure:
    figure = Figure(figsize=(8.2, 3.7))
    axes = figure.subplots(1, 2)
    for k, row in enumerate(measured.rows):
        points = [point for point in measured.points if point["method"] == row["method"]]
        color, marker = f"C{k}", "os^vDPX*<>"[k]
        _line(axes[0], points, "drift", color, marker, row["method"])
        _line(axes[1], points, "diffusion", color, marker)
        _line(axes[1], points, "rest", color, marker, style="--")
    axes[0].set_title("drift: ‖(mean step − ∇f)/ρ − r‖ / ‖r‖", fontsize=9)
    axes[1].set_title("diffusion: from SGD's (—), from Σ₀ + ρΣ₁ (– –)", fontsize=9)
    for axis in axes:
        axis.set(xscale="log", yscale="log", xlabel="ρ")
    axes[0].set_ylabel("relative error", fontsize=8)
    axes[0].set_ylim(bottom=axes[0].get_ylim()[0] / 50)  # room for the legend
    axes[1].set_ylabel("relative distance", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False, loc="lower right")
    return tune_axes(figure)


def _line(axis: Axes, points: list[dict[str, Any]], key: str, color: str, marker: str, label: str | None = None, style: str = "-") -> None:
    radii, values = [point["rho"] for point in points], [point[key] for point in points]
    axis.plot(radii, values, style, color=color, marker=marker, markersize=3.5, linewidth=1, label=label)


EXPERIMENT = Experiment(
    "Drift and diffusion of a step",
    (
        Column("method", "method"),
        *(Column(f"error_{k}", f"drift, ρ = {rho:g}", lambda value: f"{value:.2g}") for k, rho in enumerate(RADII, 1)),
        Column("order", "order in ρ", lambda value: f"{value:.2f}"),
        Column("asymmetry", "asymmetry of ∂r", lambda value: f"{value:.2g}"),
        Column("trace", "tr Σ over SGD's, ρ = 0.1", lambda value: f"{value:.4f}"),
        Column("slope", "d log tr Σ / dρ", lambda value: f"{value:.3f}"),
        Column("formula", "by formula", lambda value: f"{value:.3f}"),
        Column("others", "other problems", lambda value: f"{value[0]:.1f} … {value[1]:.1f}"),
        Column("order_noise", "order of Σ − Σ₀", lambda value: f"{value:.2f}"),
        Column("order_rest", "of Σ − Σ₀ − ρΣ₁", lambda value: f"{value:.2f}"),
    ),
    measure,
    draw,
)
