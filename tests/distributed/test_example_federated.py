"""The federated example over ranks: the ranks share the clients of a round, and the averages are those of one process."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch

from sam_kernels.cli.train.data import Digits
from tests.helpers.ranks import on_ranks, one_at_a_time

pytestmark = one_at_a_time
EXAMPLE = str(Path(__file__).parents[2] / "examples/federated_sam.py")


def _accuracies(rank: int) -> list[float]:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 10
    images = torch.randn(10, 1, 28, 28, generator=generator)[labels] + 0.5 * torch.randn(600, 1, 28, 28, generator=generator)
    run: Any = runpy.run_path(EXAMPLE)["run"]
    return run("server", 0.05, 1.0, 2, 0, Digits(images[:400], labels[:400], images[400:], labels[400:]))


def test_ranks_share_the_clients(tmp_path: Path) -> None:
    """Sums are in float64: they differ by their order in the 16th digit, and weights rarely in the 7th."""
    alone, shared = _accuracies(0), on_ranks(_accuracies, tmp_path)
    assert shared[0] == shared[1]
    assert len(set(alone)) > 1  # it learns, and the rounds differ
    assert max(abs(one - other) for one, other in zip(alone, shared[0], strict=True)) < 100 / 200 * 1.5  # one image of 200
