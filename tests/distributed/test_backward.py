"""``optimizer.backward(closure)`` under ``DistributedDataParallel``: accumulation with one reduction, equal replicas."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sam_kernels import S2SAM, SAM, MomentumSAM, VaSSO
from tests.distributed.problem import RANKS, ROWS, assert_alike, batch_of, losses_of, make_model, weights_of
from tests.helpers.ranks import on_ranks, one_at_a_time

pytestmark = one_at_a_time
STEPS, K = 3, 2
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "rho": 0.3}


def piece_of(step: int, rank: int, i: int) -> tuple[Tensor, Tensor]:
    inputs, targets = batch_of(step, rank, K)
    return inputs[i * ROWS : (i + 1) * ROWS], targets[i * ROWS : (i + 1) * ROWS]


def add_gradient(model: nn.Module, batch: tuple[Tensor, Tensor], share: float) -> Tensor:
    loss = losses_of(model, *batch).mean() * share
    loss.backward()
    return loss


RUNS: dict[str, dict[str, Any]] = {
    "local": {"make": SAM, "k": K, "local_ascent": True},
    "local-views": {"make": SAM, "k": K, "local_ascent": True, "ddp": {"gradient_as_bucket_view": True}},
    "local-views-zeroed": {"make": SAM, "k": K, "local_ascent": True, "ddp": {"gradient_as_bucket_view": True}, "set_to_none": False},
    "local-all-reduced": {"make": SAM, "k": K, "local_ascent": True, "no_sync": False},
    "averaged": {"make": SAM, "k": 1},
    "averaged-vasso": {"make": VaSSO, "k": 1},
    "averaged-views-zeroed": {"make": SAM, "k": 1, "ddp": {"gradient_as_bucket_view": True}, "set_to_none": False},
    "averaged-all-reduced": {"make": SAM, "k": K, "no_sync": False},
    "averaged-accumulated": {"make": SAM, "k": K},
    "averaged-accumulated-views": {"make": SAM, "k": K, "ddp": {"gradient_as_bucket_view": True}},
    "averaged-accumulated-unused": {"make": SAM, "k": K, "ddp": {"find_unused_parameters": True}},
    "momentum": {"make": MomentumSAM, "k": K},
    "stale": {"make": S2SAM, "k": K},
}


def on_one_rank(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, run in RUNS.items():
        ddp = DistributedDataParallel(make_model(), **run.get("ddp", {}))
        local = {"local_ascent": True} if run.get("local_ascent") else {}
        optimizer = run["make"](ddp.parameters(), torch.optim.SGD, model=ddp, **SGD, **local)
        steps = []
        for step in range(STEPS):
            for i in range(run["k"]):
                with ddp.no_sync() if run.get("no_sync", True) and i < run["k"] - 1 else nullcontext():
                    optimizer.backward(lambda i=i, step=step, ddp=ddp, run=run: add_gradient(ddp, piece_of(step, rank, i), 1 / run["k"]))
            optimizer.step()
            optimizer.zero_grad(set_to_none=run.get("set_to_none", True))
            steps.append(weights_of(ddp))
        found[name] = steps
    found["not finite"] = skips_together(rank)
    return found


def skips_together(rank: int) -> dict[str, Any]:
    """One rank's first pass is not finite."""
    ddp = DistributedDataParallel(make_model())
    optimizer = SAM(ddp.parameters(), torch.optim.SGD, model=ddp, local_ascent=True, check_finite=False, **SGD)
    before = weights_of(ddp)
    inputs, targets = piece_of(0, rank, 0)
    bad, calls = inputs.clone(), []
    if rank == 1:
        bad[0, 0] = float("nan")

    def closure() -> Tensor:
        calls.append(1)
        return add_gradient(ddp, (bad if len(calls) == 1 else inputs, targets), 1.0)

    optimizer.backward(closure)
    optimizer.step()
    return {"skipped": optimizer.skipped_steps, "same": all(map(torch.equal, weights_of(ddp), before))}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(on_one_rank, Path(tmp_path_factory.mktemp("ranks")))


def on_one_process(run: dict[str, Any]) -> list[list[Tensor]]:
    """m-SAM over all micro-batches where the ascent is local, otherwise one call for the micro-batches of all ranks together."""
    model, weights = make_model(), []
    optimizer = run["make"](model.parameters(), torch.optim.SGD, **SGD)
    for step in range(STEPS):
        for i in range(run["k"]):
            pieces = [piece_of(step, rank, i) for rank in range(RANKS)]
            if run.get("local_ascent"):
                for piece in pieces:
                    optimizer.backward(lambda piece=piece: add_gradient(model, piece, 1 / (RANKS * run["k"])))
            else:
                whole = [torch.cat(each) for each in zip(*pieces, strict=True)]
                optimizer.backward(lambda whole=whole: add_gradient(model, whole, 1 / run["k"]))
        optimizer.step()
        optimizer.zero_grad()
        weights.append(weights_of(model))
    return weights


@pytest.mark.parametrize("name", RUNS)
def test_replicas_are_equal_and_right(found: list[Any], name: str) -> None:
    for left, right in zip(found[0][name], found[1][name], strict=True):
        assert all(map(torch.equal, left, right))
    assert_alike(found[0][name], on_one_process(RUNS[name]))


def test_an_ascent_that_is_not_finite_on_one_rank_skips_the_step_on_all(found: list[Any]) -> None:
    assert [each["not finite"] for each in found] == [{"skipped": 1, "same": True}] * RANKS
