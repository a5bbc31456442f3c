"""Ranks that are killed between steps, inside one and in the middle of a save: the last complete checkpoint continues bit for bit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tests.distributed.sharded_problem import CASES, batch_of, fully_sharded, make_model
from tests.helpers.ranks import RankFailed, on_ranks, one_at_a_time

pytestmark = one_at_a_time
CASE = CASES["FriendlySAM"]  # with AdamW: moments, their step, and an average
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
WRITTEN = "rank 0 has written"
EVERY, STEPS = 2, 9  # steps between checkpoints; of the whole run


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _HalfWritten(dcp.DefaultSavePlanner):
    """Of rank 1: dies after some tensors of its file have been written, and all of rank 0's."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._left, self._folder = 5, folder

    def resolve_data(self, write_item: Any) -> Any:
        self._left -= 1
        if not self._left:
            while not (self._folder / WRITTEN).exists():
                time.sleep(0.01)
            _die()
        return super().resolve_data(write_item)


class _Written(dcp.FileSystemWriter):
    """Of rank 0: dies when its files have been written."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        super().write_data(plan, planner).wait()
        (Path(self.path).parent / WRITTEN).touch()
        _die()


def _made() -> tuple[nn.Module, Any]:
    model = fully_sharded(make_model(), init_device_mesh("cpu", (2,)))
    return model, CASE.make(model.parameters(), **CASE.options)


def _state(model: nn.Module, optimizer: Any, step: int) -> dict[str, Any]:
    return {"step": step, "model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer, options=FLAT)}


def _last_complete(folder: Path) -> Path | None:
    return max((path.parent for path in folder.glob("step-*/.metadata")), key=lambda path: int(path.name[5:]), default=None)


def _resumed(folder: Path) -> tuple[nn.Module, Any, int]:
    model, optimizer = _made()
    found = _last_complete(folder)
    if found is None:
        return model, optimizer, 0
    state = _state(model, optimizer, 0)
    dcp.load(state, checkpoint_id=found)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=FLAT)
    assert state["step"] == int(found.name[5:])
    return model, optimizer, state["step"]


def _train(rank: int, folder: Path, killed: tuple[str, int]) -> tuple[int, list[Tensor]]:
    """Where the run began, and all that it ends with: the rank's parts of weights and state. ``killed``: where, and in which step."""
    model, optimizer, start = _resumed(folder)
    for step in range(start, STEPS):
        if killed == ("between steps", step):
            _die()
        passes = []

        def closure(batch: Any = batch_of(step, rank, 2), step: int = step, passes: list[int] = passes) -> Tensor:  # noqa: B008
            optimizer.zero_grad()
            passes.append(step)
            loss: Tensor = (model(batch[0]) - batch[1]).square().mean()
            if killed == ("second pass", step) and len(passes) == 2:
                _die()
            loss.backward()
            return loss

        optimizer.step(closure)
        if (step + 1) % EVERY == 0:
            into = folder / f"step-{step + 1}"
            is_last = killed == ("save", step)
            writer, planner = (_Written(into), None) if rank == 0 else (dcp.FileSystemWriter(into), _HalfWritten(folder))
            dcp.save(
                _state(model, optimizer, step + 1),
                storage_writer=writer if is_last else dcp.FileSystemWriter(into),
                planner=planner if is_last else None,
            )
    tensors = [*model.parameters(), *(value for entry in optimizer.state_dict()["state"].values() for value in entry.values())]
    return start, [tensor.detach().to_local().clone() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _both(rank: int, whole: Path, folder: Path) -> list[tuple[int, list[Tensor]]]:
    return [_train(rank, each, ("", -1)) for each in (whole, folder)]


def test_runs_that_are_killed_end_as_one_that_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    kills = [("second pass", 3), ("between steps", 5), ("save", 7)]
    for i, killed in enumerate(kills):
        with pytest.raises(RankFailed, match="SIGKILL"):
            on_ranks(_train, tmp_path / f"killed {i}", folder, killed)
        assert _last_complete(folder) == folder / f"step-{(2, 4, 6)[i]}"
    half = folder / "step-8"
    assert sorted(path.name for path in half.iterdir()) == ["__0_0.distcp", "__1_0.distcp"]
    assert 0 < (half / "__1_0.distcp").stat().st_size < (folder / "step-6" / "__1_0.distcp").stat().st_size
    for (first, expected), (start, found) in on_ranks(_both, tmp_path / "resumed", tmp_path / "whole", folder):
        assert (first, start) == (0, 6)
        assert len(found) == len(expected) > 0
        assert all(map(torch.equal, found, expected))
    assert _last_complete(folder) == half  # saved anew, over what was left
