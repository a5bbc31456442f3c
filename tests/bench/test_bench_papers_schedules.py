"""Diminishing learning rates with momentum and without: what is paired with what, and that momentum reaches the optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch

from bench.papers import schedules
from bench.papers.context import Context
from sam_kernels.cli.train.optimizers import Settings, build

SETTINGS = [(0.9, 5e-4, 0.3), (0.0, 5e-4, 0.3), (0.9, 1e-3, 0.05), (0.0, 1e-3, 0.05)]


class MadeUp(Context):
    """Accuracies of 90 and more: 2 seed, 3 of SAM (of seed 1 one more), 5 of momentum, 0.25 of the authors' radius, 1 of Constant."""

    def map(self, run: Any, jobs: Iterable[Mapping[str, Any]], title: str) -> list[dict[str, Any]]:
        def last(job: Mapping[str, Any]) -> float:
            of_sam = (3 + job["seed"]) * (job["optimizer"] == "sam")
            of_setting = 5 * (job["momentum"] > 0) + 0.25 * (job["rho"] == 0.05)
            return float(90 + 2 * job["seed"] + of_sam + of_setting + (job["schedule"] == "Constant"))

        return [{"accuracy": [last(job)], "train_loss": [last(job) / 100]} for job in jobs]


def test_differences_are_paired_by_seed() -> None:
    rows = schedules.measure(MadeUp(True)).rows
    assert [(row["momentum"], row["weight_decay"], row["rho"]) for row in rows[::4]] == SETTINGS
    assert [row["schedule"] for row in rows[:4]] == list(schedules.SCHEDULES)
    for row in rows:
        base = 90 + 5 * (row["momentum"] > 0) + 0.25 * (row["rho"] == 0.05) + (row["schedule"] == "Constant")
        assert row["sgd"] == [pytest.approx(base + 1, abs=1e-2), 1.0]  # seeds 0 and 1
        assert row["sam_over_sgd"] == [3.5, 0.5]  # not sqrt(1 + 1.5²): of the differences
        for optimizer in ("sgd", "sam"):
            assert row[f"momentum_{optimizer}"] == ([5.0, 0.0] if row["momentum"] else None)
            assert row[f"over_constant_{optimizer}"] == ([-1.0, 0.0] if row["schedule"] != "Constant" else None)


@pytest.mark.parametrize("name", ["sgd", "sam"])
@pytest.mark.parametrize(("momentum", "wanted"), [(None, 0.9), (0.0, 0.0), (0.5, 0.5)])
def test_momentum_reaches_the_optimizer(name: str, momentum: float | None, wanted: float) -> None:
    settings = Settings("sgd", 0.1, 1e-3, 0.05, 1.0, momentum=momentum)
    (group,) = build(name, torch.nn.Linear(2, 2), settings, 0).param_groups
    assert (group["momentum"], group["weight_decay"]) == (wanted, 1e-3)
    if name == "sam":
        assert group["rho"] == 0.05
