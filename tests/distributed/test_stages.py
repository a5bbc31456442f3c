"""A model in two stages, a rank each: with ``process_group=`` the steps are those of the whole model in one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from sam_kernels import ASAM, GSAM, SAM
from tests.distributed.sharded_problem import batch_of, largest_difference
from tests.helpers.ranks import on_ranks, one_at_a_time

pytestmark = one_at_a_time
STEPS = 6
CLOSE = 1e-12  # as in test_shards.py
MAKERS: dict[str, Any] = {
    "SAM, clipped": lambda params, **more: SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1, max_grad_norm=0.3, **more),
    "ASAM, AdamW": lambda params, **more: ASAM(params, torch.optim.AdamW, lr=0.01, rho=0.5, **more),
    "GSAM": lambda params, **more: GSAM(params, torch.optim.SGD, lr=0.1, rho=0.1, **more),
    "unchecked": lambda params, **more: SAM(params, torch.optim.SGD, lr=0.1, rho=0.1, check_finite=False, **more),
}


def make_stages() -> list[nn.Module]:
    torch.manual_seed(3)
    return [nn.Sequential(nn.Linear(5, 8), nn.Tanh()).double(), nn.Linear(8, 1).double()]


def _backward_through(stage: nn.Module, rank: int, inputs: Tensor, targets: Tensor) -> float | None:
    """One micro-batch through both stages and back. The last one has the loss."""
    if rank == 0:
        hidden = stage(inputs)
        distributed.send(hidden.detach(), 1)
        grad = torch.empty_like(hidden)
        distributed.recv(grad, 1)
        hidden.backward(grad)
        return None
    received = torch.empty(len(inputs), 8, dtype=torch.float64)
    distributed.recv(received, 0)
    received.requires_grad_()
    loss = (stage(received) - targets).square().mean()
    loss.backward()
    assert received.grad is not None
    distributed.send(received.grad, 0)
    return loss.item()


def _stage_run(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, make in MAKERS.items():
        stage = make_stages()[rank]
        optimizer = make(stage.parameters(), process_group=distributed.group.WORLD)

        def closure(batch: Any, stage: nn.Module = stage, optimizer: Any = optimizer) -> float | None:
            optimizer.zero_grad()
            return _backward_through(stage, rank, *batch)

        for step in range(STEPS):
            batch = batch_of(step, 0, 1)
            optimizer.step(lambda batch=batch, closure=closure: closure(batch))
        found[name] = [param.detach() for param in stage.parameters()], optimizer.skipped_steps
    stage = make_stages()[rank]
    optimizer = MAKERS["ASAM, AdamW"](stage.parameters(), process_group=distributed.group.WORLD)
    before = [param.detach().clone() for param in stage.parameters()]

    def spoiled() -> None:
        optimizer.zero_grad()
        _backward_through(stage, rank, *batch_of(0, 0, 1))
        if rank == 1:
            next(stage.parameters()).grad.view(-1)[0] = torch.nan  # type: ignore[union-attr]

    optimizer.step(spoiled)
    found["merged"] = _merged(rank, stage, optimizer)
    found["spoiled"] = all(map(torch.equal, stage.parameters(), before)), optimizer.skipped_steps
    return found


def _merged(rank: int, stage: nn.Module, optimizer: Any) -> tuple[int, bool]:
    """Each rank loads its part of one flat checkpoint of both stages: its parameters, and whether this part's state is as before."""
    flat, files = StateDictOptions(flatten_optimizer_state_dict=True), [{}, {}]

    def put(number: float) -> None:
        for param in stage.parameters():
            optimizer.state[param]["exp_avg"].fill_(number)

    put(3.0 + rank)
    distributed.all_gather_object(files, copy.deepcopy(get_optimizer_state_dict(stage, optimizer, options=flat)))
    put(0.0)
    both = {**files[0], **files[1]}
    set_optimizer_state_dict(stage, optimizer, both, options=flat)
    is_own = all(bool((optimizer.state[param]["exp_avg"] == 3.0 + rank).all()) for param in stage.parameters())
    return sum(key.endswith(".lr") for key in both), is_own


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(_stage_run, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", MAKERS)
def test_stages_make_the_steps_of_the_whole_model(name: str, found: list[dict[str, Any]]) -> None:
    model = nn.Sequential(*make_stages())
    optimizer = MAKERS[name](model.parameters())

    def closure(inputs: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (model(inputs) - targets).square().mean()
        loss.backward()
        return loss

    for step in range(STEPS):
        batch = batch_of(step, 0, 1)
        optimizer.step(lambda batch=batch: closure(*batch))
    together = [param for on_rank in found for param in on_rank[name][0]]
    assert largest_difference(together, [param.detach() for param in model.parameters()]) <= CLOSE
    assert [on_rank[name][1] for on_rank in found] == [0, 0]


def test_stages_skip_a_step_together(found: list[dict[str, Any]]) -> None:
    assert [on_rank["spoiled"] for on_rank in found] == [(True, 1)] * 2


def test_a_stage_takes_its_part_of_a_flat_checkpoint_of_all(found: list[dict[str, Any]]) -> None:
    assert [on_rank["merged"] for on_rank in found] == [(4, True)] * 2


def test_what_is_no_process_group_is_refused() -> None:
    with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed\.ProcessGroup, got"):
        SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, process_group="stages")  # type: ignore[arg-type]


def test_a_group_without_this_rank_is_refused(tmp_path: Path) -> None:
    assert on_ranks(_in_another_group, tmp_path) == [None, None]


def _in_another_group(rank: int) -> None:
    group = distributed.new_group([0])
    if rank == 1:
        with pytest.raises((TypeError, ValueError), match="process_group"):
            SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, process_group=group)
