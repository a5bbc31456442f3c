"""The digits network of ``python -m sam_kernels train``, for λ: the library's optimizer, run by run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from bench.papers.context import Context
from bench.papers.lambda_choice import MIXES, SGD, Chosen, Mix
from sam_kernels.cli.train.data import Digits, load
from sam_kernels.cli.train.optimizers import BASES, Settings
from sam_kernels.cli.train.plan import Plan
from sam_kernels.cli.train.run import run

__all__ = ["DATA", "Budget", "measure_digits", "one_run"]

DATA = "digits"
RADII = (0.1, 0.3, 0.9)
RATES = (0.05, 0.15)


@dataclass(frozen=True)
class Budget:
    epochs: int
    tuning: int  # seeds, on held-out training images
    evaluation: int  # other seeds, on the test images
    mixes: tuple[float | str, ...] = MIXES
    batch_size: int = 128


@cache
def data(held_out: bool) -> Digits:
    return load(DATA).held_out() if held_out else load(DATA)


def one_run(noise: float, lambd: Mix, rho: float, gamma: float, seed: int, held_out: bool, epochs: int, batch_size: int) -> dict[str, Any]:
    """``error`` in % after the last epoch, on the held-out training images or on the test images."""
    settings = Settings("sgd", gamma, BASES["sgd"].weight_decay, rho, 0.0 if lambd is SGD else lambd)
    one = run("sgd" if lambd is SGD else "unified", seed, data(held_out), settings, Plan(epochs, batch_size, noise))
    return {"error": 100 * (1 - one.test_accuracy[-1])}


def measure_digits(context: Context, noise: float, budget: Budget) -> dict[Mix, Chosen]:
    """For SGD and every λ: the radius and the learning rate with the least error on held-out images, and the test errors in % with
    them, of other seeds."""

    def errors(options: list[tuple[Mix, float, float]], seeds: range, held_out: bool) -> Any:  # (options, seeds)
        size = {"noise": noise, "held_out": held_out, "epochs": budget.epochs, "batch_size": budget.batch_size}
        jobs = [{"lambd": lambd, "rho": rho, "gamma": gamma, "seed": seed, **size} for lambd, rho, gamma in options for seed in seeds]
        title = f"digits, {noise:.0%} wrong labels, {'held-out' if held_out else 'test'} images"
        return np.array([each["error"] for each in context.map(one_run, jobs, title)]).reshape(len(options), len(seeds))

    options: list[tuple[Mix, float, float]] = [(SGD, 0.0, gamma) for gamma in RATES]
    options += product(budget.mixes, RADII, RATES)
    scores = errors(options, range(budget.tuning), held_out=True).mean(1)
    best = {lambd: min((k for k, each in enumerate(options) if each[0] == lambd), key=scores.__getitem__) for lambd in (SGD, *budget.mixes)}
    seeds = range(budget.tuning, budget.tuning + budget.evaluation)
    values = errors([options[k] for k in best.values()], seeds, held_out=False)
    return {lambd: Chosen(*options[k][1:], float(scores[k]), own) for (lambd, k), own in zip(best.items(), values, strict=True)}
