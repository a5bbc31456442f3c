"""The accuracy stage: a radius for each method, then runs at equal epochs and at equal time. Runs that are there are not made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from bench.dial.methods import BASE, SAM
from bench.dial.summary import TRIES, best, equal_time_epochs, next_radius
from bench.dial.tasks import Task
from bench.dial.training import train
from bench.page import count

__all__ = ["TUNING_SEEDS", "Runner", "measure"]

TUNING_SEEDS = (100, 101)  # of the choice of ρ; reported runs have seeds 0, 1, …
Row = dict[str, Any]


class Runner:
    """Makes the runs of one task that ``runs`` lacks, adds them there and calls ``save`` after each."""

    def __init__(self, name: str, task: Task, runs: list[Row], save: Callable[[str], None], commit: str | None) -> None:
        self.name, self.task = name, task
        self._runs, self._save, self._commit = runs, save, commit
        self._known = {self._key(run): run["score"] for run in runs if run["task"] == name}

    @staticmethod
    def _key(run: Row) -> tuple[Any, ...]:
        return tuple(run[key] for key in ("method", "rho", "seed", "epochs", "held_out"))

    def score(self, method: str, rho: float | None, seed: int, epochs: int, *, held_out: bool = False) -> float:
        run = {"task": self.name, "method": method, "rho": rho, "seed": seed, "epochs": epochs, "held_out": held_out}
        key = self._key(run)
        if key not in self._known:
            score, seconds = train(self.task, method, rho, seed, epochs=epochs, held_out=held_out)
            self._known[key] = score
            self._runs.append(run | {"score": score, "seconds": round(seconds, 2), "commit": self._commit})
            shown = f"{self.name}, {method}, {'base' if rho is None else f'ρ = {rho:g}'}, {count(epochs, 'epoch')}, seed {seed}"
            self._save(f"{shown}{', held out' if held_out else ''}: {score:.{self.task.decimals}f} in {seconds:.1f} s")
        return self._known[key]

    def radius(self, method: str, seeds: Sequence[int], tries: int) -> tuple[float, dict[float, float]]:
        """Return the radius that is best on held-out data, and the mean scores of all that were tried."""
        scores: dict[float, float] = {}
        while len(scores) < tries and (rho := next_radius(scores, self.task.sign, self.task.rho)) is not None:
            scores[rho] = fmean(self.score(method, rho, seed, self.task.epochs, held_out=True) for seed in seeds)
        return best(scores, self.task.sign), scores


def measure(
    runner: Runner, methods: Sequence[str], costs: dict[str, float], *, seeds: int, tuning: Sequence[int] = TUNING_SEEDS, tries: int = TRIES
) -> list[Row]:
    """Return a row for each method: its radius, its epochs, and its scores by seed, at equal epochs and at equal time."""
    task = runner.task
    chosen = {name: (None, {}) if name == BASE else runner.radius(name, tuning, tries) for name in methods}
    epochs = {
        "equal_epochs": dict.fromkeys(methods, task.epochs),
        "equal_time": {name: equal_time_epochs(task.epochs, costs[name], costs[SAM]) for name in methods},
    }
    scores = {
        protocol: {name: [runner.score(name, chosen[name][0], seed, each[name]) for seed in range(seeds)] for name in methods}
        for protocol, each in epochs.items()
    }
    return [
        {
            "task": runner.name,
            "method": name,
            "rho": chosen[name][0],
            "tried": [[rho, score] for rho, score in sorted(chosen[name][1].items())],
            "epochs": {protocol: each[name] for protocol, each in epochs.items()},
            "scores": {protocol: each[name] for protocol, each in scores.items()},
        }
        for name in methods
    ]
