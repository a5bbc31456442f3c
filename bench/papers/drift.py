"""The mean step of SAM, USAM, m-SAM and n-SAM over every mini-batch, against the gradients of the regularised losses. arXiv 2509.18001."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench.papers.context import Context
from bench.papers.enumeration import Member, Steps, partitions
from bench.papers.experiment import Column, Experiment, Measured, cut, tune_axes
from bench.papers.small_problems import Problem

__all__ = ["CASES", "EXPERIMENT", "RADII", "Case", "Problem", "drift", "gradient_of", "order_of", "partitions", "piece", "regulariser"]

N = Problem.count
RADII = (1e-1, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class Case:
    """|S| = ``batch`` samples a step, perturbed by gradients of ``m`` samples each: pieces of S, or all data where m > |S|."""

    name: str
    batch: int
    m: int


CASES = (
    Case("mini-batch", 2, 2),
    Case("mini-batch", 4, 4),
    Case("mini-batch", 8, 8),
    Case("m", 4, 1),
    Case("m", 4, 2),
    Case("m", 8, 2),
    Case("m", 8, 4),
    Case("n", 2, 8),
    Case("n", 4, 8),
)


def regulariser(problem: Problem, lambd: float, m: int) -> Callable[[Tensor], Tensor]:
    """R of the regularised loss f + ρ R. V is the covariance of one sample's gradient.

    λ = 0: ‖∇f‖² / 2 + tr V (N - m) / (N - 1) / (2 m), drawn without replacement. λ = 1: E‖∇f_I‖, |I| = m.
    """

    def of_squares(x: Tensor) -> Tensor:
        gradients = problem.gradients(x)
        mean = gradients.mean(0)
        variance = (gradients - mean).square().sum(1).mean()
        return mean.square().sum() / 2 + variance * (N - m) / (N - 1) / (2 * m)

    def of_norms(x: Tensor) -> Tensor:
        gradients = problem.gradients(x)
        return torch.stack([gradients[list(chosen)].mean(0).norm() for chosen in combinations(range(N), m)]).mean()

    return of_norms if lambd else of_squares


def drift(problem: Problem, case: Case, lambd: float, rho: float) -> Tensor:
    """(8,): the mean of x - x⁺ over every mini-batch and every way to cut it, at learning rate 1, by :class:`sam_kernels.UnifiedSAM`."""
    return Steps(problem, Member(case.name, case.batch, case.m, lambd), rho)(problem.start).mean(0)


def gradient_of(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    x = at.clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def order_of(radii: Sequence[float], errors: Sequence[float]) -> float:
    """Slope of log error over log ρ."""
    return float(np.polyfit(np.log(radii), np.log(errors), 1)[0])


def piece(case: dict[str, Any], lambd: float) -> dict[str, Any]:
    """``errors``: of the case and λ, what the regulariser leaves of the drift, relative, at each of RADII."""
    problem, one = Problem(), Case(**case)
    plain = gradient_of(lambda x: problem.losses(x).mean(), problem.start)
    wanted = gradient_of(regulariser(problem, lambd, one.m), problem.start)
    lefts = [(drift(problem, one, lambd, rho) - plain) / rho - wanted for rho in RADII]
    return {"errors": [(left.norm() / wanted.norm()).item() for left in lefts]}


def measure(context: Context) -> Measured:
    cases = (CASES[0], CASES[2], CASES[6]) if context.quick else CASES
    jobs = [{"case": asdict(case), "lambd": lambd} for lambd in (0.0, 1.0) for case in cases]
    found = iter(context.map(piece, jobs, "drift"))
    rows, points = [], []
    for lambd in (0.0, 1.0):
        for case in cases:
            errors = [cut(error, 3) for error in next(found)["errors"]]
            order = order_of(RADII[1:], errors[1:])  # at 0.1 the next orders show
            name = f"{case.name}{', normalised' if lambd else ''}"
            rows.append({"kind": name, "batch": case.batch, "m": case.m, "lambd": lambd, "order": cut(order, 4)})
            rows[-1] |= {f"error_{k}": error for k, error in enumerate(errors, 1)}
            points += [
                {"kind": name, "batch": case.batch, "m": case.m, "rho": rho, "error": e} for rho, e in zip(RADII, errors, strict=True)
            ]
    return Measured({"samples": N, "radii": list(RADII)}, rows, points)


def draw(measured: Measured) -> Figure:
    figure = Figure(figsize=(7.6, 3.6))
    for axis, lambd, title in zip(figure.subplots(1, 2, sharey=True), (0.0, 1.0), ("USAM: λ = 0", "SAM: λ = 1"), strict=True):
        for row in (row for row in measured.rows if row["lambd"] == lambd):
            errors = [row[f"error_{k}"] for k in range(1, len(RADII) + 1)]
            axis.plot(
                RADII, errors, marker="o", markersize=3, label=f"{row['kind'].partition(',')[0]}, |S| = {row['batch']}, m = {row['m']}"
            )
        axis.plot(RADII, RADII, color="#444444", linewidth=0.8, linestyle=":", label="ρ")
        axis.set(xscale="log", yscale="log", xlabel="ρ")
        axis.set_title(title, fontsize=9)
    figure.axes[0].set_ylabel("‖(drift − ∇f) / ρ − ∇R‖ / ‖∇R‖", fontsize=8)
    figure.axes[0].legend(fontsize=6.5, frameon=False)
    return tune_axes(figure)


EXPERIMENT = Experiment(
    "What SAM regularises",
    (
        Column("kind", "perturbed by"),
        Column("batch", "batch"),
        Column("m", "m"),
        *(Column(f"error_{k}", f"ρ = {rho:g}", lambda value: f"{value:.2g}") for k, rho in enumerate(RADII, 1)),
        Column("order", "order in ρ", lambda value: f"{value:.2f}"),
    ),
    measure,
    draw,
)
