"""SAM around ``ZeroRedundancyOptimizer``, which shards the base's state alone, against the same optimizer on one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from sam_kernels import SAM
from tests.distributed.problem import CLOSE, RANKS, STEPS, batch_of, losses_of, make_model, weights_of
from tests.helpers.ranks import on_ranks, one_at_a_time

pytestmark = one_at_a_time

ADAMW: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
MORE: dict[str, Any] = {"rho": 0.3, "max_grad_norm": 1.0}


def _steps(optimizer: Any, model: nn.Module, steps: range, rank: int | None, k: int = 1) -> list[list[Tensor]]:
    """``rank``: whose batches; None for those of all ranks, one after another, as micro-batches or as one batch."""
    weights = []

    def closure(inputs: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = losses_of(model, inputs, targets).mean()
        loss.backward()
        return loss

    for step in steps:
        if rank is not None:
            optimizer.step(closure, batch=batch_of(step, rank, k), micro_batches=k)
        else:
            whole = [torch.cat(each) for each in zip(*(batch_of(step, each, k) for each in range(RANKS)), strict=True)]
            optimizer.step(closure, batch=whole, micro_batches=1 if k == 1 else RANKS * k)
        weights.append(weights_of(model))
    return weights


def _make(model: nn.Module, *, local: bool) -> Any:
    return SAM(
        model.parameters(), ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW, model=model, local_ascent=local, **ADAMW, **MORE
    )


def _all(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    _groups_apart(rank)
    for local, k in ((False, 1), (True, 2)):
        model = DistributedDataParallel(make_model())
        optimizer = _make(model, local=local)
        found[f"local={local}"] = _steps(optimizer, model, range(STEPS), rank, k)
        base: Any = optimizer.base_optimizer
        found[f"states local={local}"] = sum(len(state) > 0 for state in base.optim.state.values())
    # The state goes to rank 0, is given to all ranks as a file would be, and the run goes on.
    base.consolidate_state_dict(to=0)
    for how in ("base", "wrapper"):
        saved: list[Any] = [(optimizer if how == "wrapper" else base).state_dict() if rank == 0 else None]
        distributed.broadcast_object_list(saved, src=0)
        other = DistributedDataParallel(copy.deepcopy(model.module))
        again = _make(other, local=True)
        (again if how == "wrapper" else again.base_optimizer).load_state_dict(copy.deepcopy(saved[0]))
        if how == "base":
            pairs = ((other, again.base_optimizer.optim.state), (model, base.optim.state))
            found["base"] = [[state[param]["exp_avg"].clone() for param in each.parameters() if param in state] for each, state in pairs]
        else:
            found["again"] = _steps(again, other, range(STEPS, STEPS + 2), rank, 2)
    found["further"] = _steps(optimizer, model, range(STEPS, STEPS + 2), rank, 2)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(_all, tmp_path_factory.mktemp("zero"), ranks=RANKS)


@pytest.mark.parametrize(("local", "k"), [(False, 1), (True, 2)])
def test_the_steps_are_those_of_one_process(found: list[dict[str, Any]], local: bool, k: int) -> None:
    model = make_model()
    right = _steps(SAM(model.parameters(), torch.optim.AdamW, **ADAMW, **MORE), model, range(STEPS), None, k)
    for step, expected in enumerate(right):
        left, other = (rank[f"local={local}"][step] for rank in found)
        assert all(map(torch.equal, left, other)), f"step {step}"
        torch.testing.assert_close(left, expected, **CLOSE)


def test_every_rank_has_a_part_of_the_state(found: list[dict[str, Any]]) -> None:
    parts = [rank["states local=False"] for rank in found]
    assert all(parts)
    assert sum(parts) == len(list(make_model().parameters()))


def test_the_consolidated_state_comes_back(found: list[dict[str, Any]]) -> None:
    for rank in found:
        loaded, saved = rank["base"]
        assert saved
        assert all(map(torch.equal, loaded, saved))


def test_a_checkpoint_of_the_whole_optimizer_continues_the_run(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert all(map(torch.equal, rank["again"][-1], rank["further"][-1]))


def _hangs(rank: int) -> None:
    if rank == 0:
        distributed.barrier()
    else:
        torch.multiprocessing.get_context("spawn").Event().wait()


def _groups_apart(rank: int) -> None:
    """Beside: modules that are replicated over different ranks cannot agree."""
    groups = [distributed.new_group([each]) for each in range(RANKS)]
    both = [DistributedDataParallel(make_model()), DistributedDataParallel(make_model(), process_group=groups[rank])]
    with pytest.raises(ValueError, match="replicated over different ranks"):
        SAM([param for each in both for param in each.parameters()], torch.optim.SGD, lr=0.1, model=both)


def test_a_rank_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="_hangs on 2 ranks has not ended"):
        on_ranks(_hangs, tmp_path, timeout=5.0)
