"""Problem classes on which λ is tuned: linear models, every setting of every instance in one batched run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize

from bench import batched
from bench.linear_models import LOSSES, Draw, Floats, LinearModels
from bench.papers.experiment import compare, look
from bench.papers.lambda_choice import MIXES, SGD, Mix, choose, to_json
from sam_kernels.sampling import TauNiceBatchSampler

__all__ = ["CLASSES", "RADII", "RATES", "Grid", "ProblemClass", "make", "minima", "piece"]

N, D, TAU = 40, 20, 10  # samples, parameters, samples a step
N_TEST = 1000
RADII = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
RATES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # learning rates, over the curvature of the loss: the largest eigenvalue of E[a a'] is 1


@dataclass(frozen=True)
class ProblemClass:
    title: str
    loss: str
    condition: float  # of E[a a'], eigenvalues 1 / condition, …, 1
    ridge: float
    steps: int
    noise: float  # standard deviation of the targets' noise; of logistic regression: the share of wrong labels


CLASSES = {
    "squares_10": ProblemClass("least squares, κ = 10", "squares", 10, 0.0, 200, 0.0),
    "squares_1000": ProblemClass("least squares, κ = 1000", "squares", 1000, 0.0, 1000, 0.0),
    "ridge_10": ProblemClass("ridge, κ = 10", "squares", 10, 0.01, 1000, 0.5),
    "ridge_1000": ProblemClass("ridge, κ = 1000", "squares", 1000, 0.01, 1000, 0.5),
    "logistic": ProblemClass("logistic regression", "logistic", 10, 0.001, 1000, 0.1),
    "log": ProblemClass("log(1 + r²)", "log", 10, 0.0, 1000, 0.5),
}


def make(kind: ProblemClass, streams: int) -> tuple[LinearModels, LinearModels]:
    """Instances to train on, and N_TEST more samples of each to test on, without the ridge."""
    generator = np.random.default_rng(0)
    scales = np.geomspace(1 / kind.condition, 1, D) ** 0.5
    point = generator.standard_normal((streams, D, 1))
    a = generator.standard_normal((streams, N + N_TEST, D)) * scales
    b = (a @ point)[..., 0]
    if kind.loss == "logistic":
        b = np.where(generator.random(b.shape) < kind.noise, -1.0, 1.0) * np.sign(b)
    else:
        b = b + kind.noise * generator.standard_normal(b.shape)
    return LinearModels(kind.loss, a[:, :N], b[:, :N], kind.ridge), LinearModels(kind.loss, a[:, N:], b[:, N:])


def minima(models: LinearModels) -> Floats:
    """(streams,): of the training objective, near the point that BFGS finds from 0."""
    every = models.batch(None)
    found = []
    for stream in range(models.streams):
        one = LinearModels(models.loss, every[0][stream : stream + 1], every[1][stream : stream + 1], models.ridge)

        def f(x: Floats, one: LinearModels = one) -> tuple[float, Floats]:
            return float(one.f(x[None, None])[0, 0]), one.gradient(x[None, None], one.batch(None))[0, 0]

        found.append(minimize(f, np.zeros(models.d), jac=True, method="BFGS", options={"gtol": 1e-10}).fun)
    return np.array(found)


@dataclass(frozen=True)
class Grid:
    """Every (λ, ρ, γ): those of SGD (ρ = 0) first."""

    runs: tuple[tuple[Mix, float, float], ...]

    @classmethod
    def of(cls, curvature: float) -> Grid:
        rates = [rate / curvature for rate in RATES]
        sgd = [(SGD, 0.0, gamma) for gamma in rates]
        return cls((*sgd, *((lambd, rho, gamma) for lambd in MIXES for rho in RADII for gamma in rates)))

    def steps(self) -> batched.Steps:
        fixed = np.array([lambd if isinstance(lambd, float) else 0.0 for lambd, _, _ in self.runs])
        rises, falls = (np.array([run[0] == name for run in self.runs]) for name in ("1-1/t", "1/t"))

        def lambd(t: int) -> Floats:
            return np.asarray(np.where(falls, 1 / t, np.where(rises, 1 - 1 / t, fixed)))

        rho, gamma = (np.array([run[k] for run in self.runs]) for k in (1, 2))
        return batched.Steps(rho, lambd, gamma)


def batches(streams: int, number: int) -> Iterator[Draw]:
    """tau-nice: subsets without replacement, one a stream."""
    samplers = [iter(TauNiceBatchSampler(N, TAU, num_batches=number, seed=seed)) for seed in range(streams)]
    weights = np.full((streams, TAU), 1 / TAU)
    for _ in range(number):
        yield np.array([[int(index) for index in next(sampler)] for sampler in samplers]), weights


def piece(name: str, steps: int, tuning: int, evaluation: int, compared: int) -> dict[str, Any]:
    """Of one of CLASSES: ``chosen``, for each score what :func:`lambda_choice.choose` finds by the logarithms of f - f* in training and of
    the test loss, means over the last fifth of the steps; ``compared``: with the optimizer, so many steps."""
    kind, streams = CLASSES[name], tuning + evaluation
    grid = Grid.of(LOSSES[kind.loss].curvature)
    models, test = make(kind, streams)
    lowest = minima(models)[:, None] if kind.noise else np.zeros((streams, 1))
    start, plan = np.zeros((streams, len(grid.runs), D)), grid.steps()
    # A subset of the runs, so that the comparison does not make all of them.
    few = Grid(grid.runs[:: max(1, len(grid.runs) // 24)])
    checked = compare(models, start[:, : len(few.runs)], list(batches(streams, compared)), few.steps(), 12)

    def see(x: Floats) -> Floats:
        return np.stack([models.f(x) - lowest, test.f(x)])

    times = np.unique(np.linspace(0.8 * steps, steps, 6).round().astype(int)).tolist()
    found = look(models, start, batches(streams, steps), plan, times, see).mean(0)  # (scores, instances, runs)
    scores = np.log(np.where(np.isfinite(found), found, np.inf))
    return {"chosen": [to_json(choose(grid.runs, each, tuning)) for each in scores], "compared": checked}
