"""The digits network of ``python -m sam_kernels train``, for λ: the library's optimizer, run by run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.papers.lambda_choice import MIXES, SGD, Chosen, Mix
from sam_kernels.cli.train.data import Digits
from sam_kernels.cli.train.optimizers import BASES, Settings
from sam_kernels.cli.train.run import Plan, run

__all__ = ["Budget", "measure_digits"]

RADII = (0.1, 0.3, 0.9)
RATES = (0.05, 0.15)


@dataclass(frozen=True)
class Budget:
    epochs: int
    tuning: int  # seeds, on held-out training images
    evaluation: int  # other seeds, on the test images
    mixes: tuple[float | str, ...] = MIXES
    batch_size: int = 128


def measure_digits(data: Digits, noise: float, budget: Budget, tell: Callable[[str], None]) -> dict[Mix, Chosen]:
    """For SGD and every λ: the radius and the learning rate with the least error on held-out images, and the test errors in % with
    them, of other seeds."""
    plan = Plan(budget.epochs, budget.batch_size, noise)
    held_out, base = data.held_out(), BASES["sgd"]
    found: dict[Mix, Chosen] = {}

    def error(where: Digits, lambd: Mix, rho: float, gamma: float, seed: int) -> float:
        settings = Settings("sgd", gamma, base.weight_decay, rho, 0.0 if lambd is SGD else lambd)
        one = run("sgd" if lambd is SGD else "unified", seed, where, settings, plan)
        return 100 * (1 - one.test_accuracy[-1])

    for lambd in (SGD, *budget.mixes):
        options = [(rho, gamma) for rho in (RADII if lambd is not SGD else (0.0,)) for gamma in RATES]
        scores = [np.mean([error(held_out, lambd, *option, seed) for seed in range(budget.tuning)]) for option in options]
        rho, gamma = options[int(np.argmin(scores))]
        seeds = range(budget.tuning, budget.tuning + budget.evaluation)
        values = np.array([error(data, lambd, rho, gamma, seed) for seed in seeds])
        found[lambd] = Chosen(rho, gamma, float(min(scores)), values)
        tell(f"{noise:.0%} wrong labels, λ = {'none (SGD)' if lambd is SGD else lambd}")
    return found
