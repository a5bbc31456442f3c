"""Checkpoints of shards by ``torch.distributed.checkpoint``: other numbers of ranks, and a model that is not sharded, continue them.

In three forms: nested, flat, and whole on the CPU of rank 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh

from tests.distributed.sharded_problem import CASES, batch_of, closure_of, fully_sharded, largest_difference, make_model, whole
from tests.helpers.ranks import on_ranks, one_at_a_time

pytestmark = one_at_a_time
FORMS = {
    "nested": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "whole": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
BACK = {**FORMS, "whole": StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)}
ITEMS = [
    *(("SAM, SGD", form) for form in FORMS),  # state of the base alone
    *(("VaSSO", form) for form in FORMS),  # averages
    ("FriendlySAM", "nested"),
    *(("LookSAM", form) for form in ("nested", "flat")),  # a gradient that is kept
    ("GSAM", "flat"),  # the name of a descent rule, that of a direction, and nothing that is kept
    ("RSAM without noise", "flat"),
]
SAVED, STEPS = 3, 6  # steps: the second look of LookSAM (k = 3) is the first one after the checkpoint
CLOSE = 1e-12  # as in test_shards.py


def _steps(optimizer: Any, model: nn.Module, steps: range, part: int, parts: int) -> None:
    closure = closure_of(optimizer, model)
    for step in steps:
        batch = batch_of(step, part, parts)
        optimizer.step(lambda batch=batch: closure(*batch))


def _made(name: str, *, is_sharded: bool = True) -> tuple[nn.Module, Any]:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    model = fully_sharded(make_model(), mesh) if is_sharded else make_model()
    return model, CASES[name].make(model.parameters(), **CASES[name].options)


def _save(rank: int, folder: Path) -> dict[str, list[Tensor]]:
    """Weights at the end of a run that saves on the way."""
    found = {}
    for name in dict.fromkeys(name for name, _ in ITEMS):
        model, optimizer = _made(name)
        _steps(optimizer, model, range(SAVED), rank, 2)
        for form in [form for each, form in ITEMS if each == name]:
            weights, state = get_state_dict(model, optimizer, options=FORMS[form])
            both = {"model": weights, "optimizer": state}
            if form != "whole":
                dcp.save(both, checkpoint_id=folder / name / form)
            elif rank == 0:
                torch.save(both, folder / name / f"{form}.pt")
            else:
                assert not weights
                assert not state
        _steps(optimizer, model, range(SAVED, STEPS), rank, 2)
        found[name] = [whole(param) for param in model.parameters()]
    return found


def _continue(rank: int, folder: Path, is_sharded: bool) -> dict[tuple[str, str], list[Tensor]]:
    found = {}
    for name, form in ITEMS:
        model, optimizer = _made(name, is_sharded=is_sharded)
        if form == "whole":
            both = torch.load(folder / name / f"{form}.pt", weights_only=True) if rank == 0 else {"model": {}, "optimizer": {}}
        else:
            weights, state = get_state_dict(model, optimizer, options=FORMS[form])
            both = {"model": weights, "optimizer": state}
            dcp.load(both, checkpoint_id=folder / name / form)
        set_model_state_dict(model, both["model"], options=BACK[form])  # set_state_dict sends no weights to ranks that are given none
        set_optimizer_state_dict(model, optimizer, both["optimizer"], options=BACK[form])
        _steps(optimizer, model, range(SAVED, STEPS), rank, distributed.get_world_size())
        assert optimizer.param_groups[0]["sam_step"] == STEPS
        assert all(option in optimizer.defaults or option == "params" for option in optimizer.param_groups[0])
        found[name, form] = [whole(param) for param in model.parameters()]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[Tensor]]:
    return on_ranks(_save, folder / "ranks", folder)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("ranks", "is_sharded"), [(2, True), (1, True), (3, True), (1, False)])
def test_a_checkpoint_of_two_ranks_is_continued(ranks: int, is_sharded: bool, folder: Path, expected: Any, tmp_path: Path) -> None:
    for on_rank in on_ranks(_continue, tmp_path, folder, is_sharded, ranks=ranks):
        for name, form in ITEMS:
            found = on_rank[name, form]
            if ranks == 2:
                assert all(map(torch.equal, found, expected[name])), (name, form)
            assert largest_difference(found, expected[name]) <= CLOSE, (name, form)
