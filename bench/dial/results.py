"""A result file, read: costs, scores, gains and shares by task, method and protocol."""

from __future__ import annotations

from typing import Any

import click

from bench.dial.methods import BASE, METHODS, SAM
from bench.dial.summary import equal_time_epochs, gains, share
from bench.dial.tasks import TASKS
from sam_kernels.cli.train.report import Estimate

__all__ = ["PROTOCOLS", "Results"]

PROTOCOLS = {"equal_epochs": "equal epochs", "equal_time": "equal time"}
Row = dict[str, Any]


class Results:
    """The tasks and methods that both stages have. Refuses runs at equal time whose epochs are not those of the costs in the same file."""

    def __init__(self, result: Row) -> None:
        self._costs = {(row["task"], row["method"]): row["of_base"] for row in result["cost"]}
        self._rows = {(row["task"], row["method"]): row for row in result["accuracy"]}
        self.tasks = [name for name in TASKS if (name, SAM) in self._rows]
        self.methods = [name for name in METHODS if all((task, name) in self._rows for task in self.tasks)]
        for (name, method), row in self._rows.items():
            epochs, costs = row["epochs"], (self._costs[name, each][1] for each in (method, SAM))
            if epochs["equal_time"] != equal_time_epochs(epochs["equal_epochs"], *costs):
                raise click.ClickException(f"{name}, {method}: costs were measured again after its runs: run --stages accuracy")

    def row(self, task: str, method: str) -> Row:
        return self._rows[task, method]

    def cost(self, task: str, method: str) -> list[float]:
        """Return a step over one of the base: 20, 50 and 80 % of the rounds."""
        return list(self._costs[task, method])

    def score(self, task: str, method: str, protocol: str) -> Estimate:
        return Estimate.of(self._scores(task, method, protocol))

    def gain(self, task: str, method: str, protocol: str) -> Estimate:
        """Return how much better than the base's of the same protocol a score is: the mean of pairs, and its standard error."""
        return Estimate.of(self._gains(task, method, protocol))

    def share(self, task: str, method: str, protocol: str) -> Estimate | None:
        """Return the share of SAM's gain that a method keeps; None where SAM has none, and for the base, which has 0 by definition."""
        return None if method == BASE else share(self._gains(task, method, protocol), self._gains(task, SAM, protocol))

    def _scores(self, task: str, method: str, protocol: str) -> list[float]:
        return list(self._rows[task, method]["scores"][protocol])

    def _gains(self, task: str, method: str, protocol: str) -> list[float]:
        return gains(self._scores(task, method, protocol), self._scores(task, BASE, protocol), TASKS[task].sign)
