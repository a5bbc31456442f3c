"""Wrong labels: SGD fits them, SAM fewer, micro-batches fewer still."""

from __future__ import annotations

from typing import Any

from sam_kernels.cli.prove.claims import Jobs, Measured, bar, difference
from sam_kernels.cli.train.data import load
from sam_kernels.cli.train.optimizers import BASES, Settings
from sam_kernels.cli.train.plan import Plan
from sam_kernels.cli.train.run import run

__all__ = ["accuracy_after", "wrong_labels"]

NOISE = 0.4
METHODS = {"SGD": "sgd", "SAM": "sam", "m-SAM": "msam"}


def accuracy_after(name: str, seed: int, data: str, epochs: int, batch_size: int, micro_batch_size: int, rho: float) -> float:
    """Test accuracy in % after the last epoch, by correct labels."""
    base = BASES["sgd"]
    settings = Settings("sgd", base.lr, base.weight_decay, rho, 1.0, micro_batch_size=micro_batch_size)
    normalization = "batch" if data == "mnist5k" else "group"
    return 100 * run(name, seed, load(data), settings, Plan(epochs, batch_size, NOISE, normalization)).test_accuracy[-1]


def wrong_labels(quick: bool, jobs: Jobs) -> Measured:
    """5,000 MNIST images, 30 epochs, m = 64, three seeds; quick: 1,797 digits of 8 x 8, 40 epochs, m = 128, two seeds."""
    full: dict[str, Any] = {"data": "mnist5k", "epochs": 30, "batch_size": 128, "micro_batch_size": 64, "rho": 0.3}
    small: dict[str, Any] = {"data": "digits", "epochs": 40, "batch_size": 256, "micro_batch_size": 128, "rho": 0.1}
    settings, seeds = (small, 2) if quick else (full, 3)
    made = [{"name": name, "seed": seed, **settings} for name in METHODS.values() for seed in range(seeds)]
    found = jobs(accuracy_after, made)
    scores = {title: found[k * seeds : (k + 1) * seeds] for k, title in enumerate(METHODS)}
    effect, error = difference(scores["m-SAM"], scores["SGD"])
    return Measured(effect, error, [bar(title, values) for title, values in scores.items()], {**settings, "noise": NOISE, "seeds": seeds})
