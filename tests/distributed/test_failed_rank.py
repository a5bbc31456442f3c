"""An exception on one rank: others stop when the process group times out, all have the weights of before, and errors name the rank."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from sam_kernels import GSAM, SAM
from sam_kernels.optim._shards.dtensor import local_of
from tests.distributed.sharded_problem import batch_of, fully_sharded, make_model
from tests.helpers.ranks import on_ranks, one_at_a_time

pytestmark = one_at_a_time
RANKS, STEPS = 2, 3
TIMEOUT, LONG = timedelta(seconds=3), timedelta(seconds=60)
SGD: dict[str, Any] = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9, "rho": 0.1}


class Hooked(nn.Module):
    """Calls ``self.at(place)`` in the middle of the forward pass, and of the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.at: Callable[[str], None] = lambda place: None

    def forward(self, hidden: Tensor) -> Tensor:
        self.at("forward")
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: self.at("backward"))
        return hidden


@dataclass
class Setting:
    """A model of one kind, its optimizer, and a closure that raises on a rank in call ``call`` at ``place``."""

    kind: str
    make: Any = SAM

    def __post_init__(self) -> None:
        mesh, inner = init_device_mesh("cpu", (RANKS,)), make_model()
        self.rank, self.hooked = distributed.get_rank(), Hooked()
        inner = nn.Sequential(*inner[:2], self.hooked, *inner[2:])  # type: ignore[index,misc]
        self.model: nn.Module = inner
        more: dict[str, Any] = {}
        if self.kind == "FSDP2":
            fully_sharded(inner, mesh)
        elif self.kind == "tensor parallel":
            self.model = parallelize_module(inner, mesh, {"0": ColwiseParallel(), "3": RowwiseParallel()})
        else:
            more["model"] = self.model = DistributedDataParallel(inner)
        self.optimizer = self.make(self.model.parameters(), **SGD, **more)
        self.calls, self.fails_at, self.error = 0, (0, ""), ValueError

    def at(self, place: str) -> None:
        if (self.calls, place) == self.fails_at:
            if self.error is RuntimeError:
                torch.empty(1 << 50)  # no machine has so much memory
            raise self.error(f"at {place}")

    def closure(self, step: int) -> Tensor:
        self.calls += 1
        self.optimizer.zero_grad()
        self.at("start")
        self.hooked.at = self.at
        inputs, targets = batch_of(step, self.rank, RANKS) if self.kind != "tensor parallel" else batch_of(step, 0, 1)
        loss: Tensor = (self.model(inputs) - targets).square().mean()
        self.at("between")
        loss.backward()
        self.at("end")
        return loss

    def halves(self, step: int) -> None:
        self.closure(step)
        self.optimizer.first_step(zero_grad=True)
        self.closure(step)
        self.at("second_step")
        self.optimizer.second_step()

    def fail(self, call: int, place: str, error: type[Exception] = ValueError, *, by_halves: bool = False) -> dict[str, Any]:
        """A step that fails. What it has left, and what it has said."""
        before, self.fails_at, self.error = self.weights(), (call, place), error  # type: ignore[assignment]
        try:
            self.halves(0) if by_halves else self.optimizer.step(lambda: self.closure(0))
        except Exception as raised:
            kind, notes = type(raised).__name__, getattr(raised, "__notes__", [])
        else:
            kind, notes = "", []
        self.calls, self.fails_at = 0, (0, "")
        t = self.optimizer.param_groups[0]["sam_step"]
        return {"restored": all(map(torch.equal, self.weights(), before)), "t": t, "kind": kind, "notes": "\n".join(notes)}

    def weights(self) -> list[Tensor]:
        return [local_of(param).detach().clone() for param in self.model.parameters()]

    def run(self) -> list[Tensor]:
        for step in range(STEPS):
            self.optimizer.step(lambda step=step: self.closure(step))
        return self.weights()


# --- one rank alone ---

TIMES_OUT = "before its first collective"  # in the other cases the rank that has raised then leaves, so that nobody waits so long
ALONE: dict[str, tuple[str, int, str, Any]] = {
    TIMES_OUT: ("FSDP2", 1, "start", ValueError),
    "out of memory": ("FSDP2", 2, "forward", torch.OutOfMemoryError),
    "after its last collective": ("FSDP2", 2, "end", ValueError),
    "tensor parallel": ("tensor parallel", 2, "between", RuntimeError),
    "replicas": ("DDP", 2, "end", ValueError),
    "halves": ("FSDP2", 2, "second_step", ValueError),
}


def _alone(rank: int, folder: Path) -> dict[str, Any]:
    found = {}
    for name, (kind, call, place, error) in ALONE.items():
        times_out = name == TIMES_OUT
        _new_processes(rank, folder, len(found), TIMEOUT if times_out else LONG)
        setting = Setting(kind)
        mine = (call, place) if rank == 1 else (0, "")
        found[name] = setting.fail(*mine, error, by_halves=name == "halves")
        if times_out:  # stay until the other rank has given up
            _meet(rank, folder, "after the timeout")
        del setting  # its modules keep the group, and the connections would stay open
        gc.collect()
    _new_processes(rank, folder, len(found), LONG)
    return found


def _new_processes(rank: int, folder: Path, number: int, timeout: timedelta) -> None:
    """A group that nothing has failed in, once all ranks are here. This rank leaves the one of before."""
    distributed.destroy_process_group()
    _meet(rank, folder, str(number))
    init = f"file://{folder}/store-{number}"
    distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=RANKS, timeout=timeout)


def _meet(rank: int, folder: Path, where: str) -> None:
    store = distributed.FileStore(str(folder / f"meet {where}"), RANKS)  # type: ignore[call-arg]
    store.set(str(rank), "")
    store.wait([str(each) for each in range(RANKS)], LONG)


# --- all ranks at the same place: the processes survive ---

IN_BETWEEN = "FSDP2, forward pass between first_step and second_step"
TOGETHER: dict[str, tuple[str, Any, int, str]] = {
    f"{kind}, {'second' if call == 2 else 'first'} pass, {place}": (kind, make, call, place)
    for kind, make, call, place in [
        ("FSDP2", SAM, 1, "between"),
        ("FSDP2", SAM, 1, "forward"),
        ("FSDP2", SAM, 2, "start"),
        ("FSDP2", SAM, 2, "forward"),
        ("FSDP2", GSAM, 2, "backward"),
        ("FSDP2", SAM, 2, "end"),
        ("tensor parallel", GSAM, 2, "backward"),
        ("DDP", SAM, 2, "between"),
    ]
} | {IN_BETWEEN: ("FSDP2", SAM, 2, "forward")}


def _together(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (kind, make, call, place) in TOGETHER.items():
        setting = Setting(kind, make)
        failed = setting.fail(call, place, by_halves=name == IN_BETWEEN)
        found[name] = failed, setting.run(), Setting(kind, make).run()
    return found


def _all(rank: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return _together(rank), _alone(rank, folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(_all, folder, folder, ranks=RANKS)


@pytest.mark.parametrize("name", ALONE)
def test_one_rank_raises_and_every_rank_has_its_weights_again(name: str, found: Any) -> None:
    waiting, failed = (on_rank[1][name] for on_rank in found)
    assert [failed["kind"], waiting["kind"]] == [ALONE[name][3].__name__, "RuntimeError"]
    between = name == "halves"  # it is the caller who has raised there: the weights stay perturbed until the next first_step
    assert [failed["restored"], waiting["restored"]] == [not between, True]
    assert [failed["t"], waiting["t"]] == [int(between), 0]
    if sys.version_info >= (3, 11):
        assert "SAM: a collective failed on rank 0 of 2: another rank has probably raised" in waiting["notes"]
        if not between:
            assert "SAM: raised on rank 1 of 2, whose weights are those of before the step" in failed["notes"]


@pytest.mark.parametrize("name", TOGETHER)
def test_training_goes_on_after_an_exception_on_all_ranks_as_if_it_had_not_been(name: str, found: Any) -> None:
    for failed, after, undisturbed in (on_rank[0][name] for on_rank in found):
        # In between it is the caller who has raised: the next step restores the weights, before its first pass.
        assert (failed["kind"], failed["restored"], failed["t"]) == ("ValueError", name != IN_BETWEEN, int(name == IN_BETWEEN))
        assert all(map(torch.equal, after, undisturbed))
