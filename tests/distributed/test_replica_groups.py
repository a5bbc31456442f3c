"""m-SAM over the replica groups of HSDP: two groups of two ranks against one process that is given the batches of both groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from sam_kernels import ASAM, GCSAM, RSAM, RWSAM, SAM
from sam_kernels.optim._engine.ascent_step import AscentStep
from sam_kernels.optim.directions import Gradient
from tests.distributed.sharded_problem import (
    ByNormAndLoss,
    batch_of,
    fully_sharded,
    largest_difference,
    losses_of,
    make_model,
    thirty_steps_in_bfloat16,
    whole,
)
from tests.helpers.ranks import on_ranks, one_at_a_time

pytestmark = one_at_a_time
GROUPS, SHARDS = 2, 2
RANKS = GROUPS * SHARDS
SGD: dict[str, Any] = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9, "rho": 0.1}
ADAMW: dict[str, Any] = {"base_optimizer": torch.optim.AdamW, "lr": 0.01, "rho": 0.1}
MIX: dict[str, Any] = {"base_optimizer": torch.optim.Adam, "lr": 0.01, "rho": 0.1, "lambd": 0.3}  # depends on the gradient's scale
CLOSE = 1e-12  # as in test_shards.py
CLOSE_IN_FLOAT32 = 2e-5  # some hundred roundings of 6e-8
BAD_STEP = 1


@dataclass(frozen=True)
class Run:
    make: Callable[..., Any] = SAM
    options: dict[str, Any] = field(default_factory=lambda: SGD)
    k: int = 1
    steps: int = 4
    backward: bool = False
    fsdp: Callable[[], dict[str, Any]] = dict  # options of fully_shard
    divides_by: float | None = None
    dtype: torch.dtype = torch.float64


RUNS = {
    "SGD": Run(steps=10),
    "SGD, micro-batches": Run(k=2, steps=10),
    "AdamW": Run(options=ADAMW, steps=10),
    "AdamW, micro-batches": Run(options=ADAMW, k=2),
    "mix, clipped": Run(options={**MIX, "max_grad_norm": 0.2}),
    "mix, clipped, micro-batches": Run(options={**MIX, "max_grad_norm": 0.2}, k=2),
    "mix, divided by four": Run(options=MIX, divides_by=4.0),
    "mix, float32": Run(options=MIX, dtype=torch.float32),
    "ASAM": Run(make=ASAM, options={**ADAMW, "rho": 0.5}),
    "base's own step": Run(options={"base_optimizer": torch.optim.RMSprop, "lr": 0.01, "rho": 0.1}, k=2),
    "radius by norm and loss": Run(options={**SGD, "rho": ByNormAndLoss()}, k=2),
    "GCSAM": Run(make=GCSAM),
    "RSAM without noise": Run(make=RSAM, options={**SGD, "sigma": 0.0}, k=2),
    "RWSAM": Run(make=RWSAM, options={**SGD, "beta": 2.0}, k=2),
    "RWSAM, drawn": Run(make=RWSAM, options={**SGD, "beta": 2.0, "sampling": "draw", "draws": 4}, k=2),
    "backward": Run(k=2, backward=True),
    "gathered weights stay": Run(fsdp=lambda: {"reshard_after_forward": False}),
    "gathered weights go": Run(fsdp=lambda: {"reshard_after_forward": True}),
    "parameters on the CPU": Run(fsdp=lambda: {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
}


@cache
def mesh_of_groups() -> Any:
    return init_device_mesh("cpu", (GROUPS, SHARDS), mesh_dim_names=("replicate", "shard"))


def hybrid(run: Run) -> Any:
    model: Any = fully_sharded(make_model().to(run.dtype), mesh_of_groups(), **run.fsdp())
    for module in (model, model[0]) if run.divides_by is not None else ():
        module.set_gradient_divide_factor(run.divides_by)
    return model


def pieces_of(run: Run, step: int, ranks: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of some ranks together."""
    by_rank = [[tensor.to(run.dtype).chunk(run.k) for tensor in batch_of(step, rank, RANKS)] for rank in ranks]
    inputs, targets = ([torch.cat([pieces[i][j] for pieces in by_rank]) for j in range(run.k)] for i in range(2))
    return list(zip(inputs, targets, strict=True))


def step_of(run: Run, optimizer: Any, model: nn.Module, pieces: Sequence[tuple[Tensor, Tensor]]) -> None:
    def closure(inputs: Tensor, targets: Tensor) -> Tensor:
        if isinstance(optimizer, RWSAM):
            return losses_of(model, inputs, targets)
        if not run.backward:
            optimizer.zero_grad()
        loss: Tensor = (model(inputs) - targets).square().mean()
        (loss / len(pieces) if run.backward else loss).backward()
        return loss

    if not run.backward:
        optimizer.step([lambda piece=piece: closure(*piece) for piece in pieces])
        return
    for piece in pieces:
        optimizer.backward(lambda piece=piece: closure(*piece))
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(run: Run, model: nn.Module, **more: Any) -> Any:
    given = {} if run.make is RWSAM else {"model": model}
    return run.make(model if run.make is RWSAM else model.parameters(), **{**run.options, **more}, **given, local_ascent=True)


def weights_of(model: nn.Module) -> list[Tensor]:
    return [whole(param) for param in model.parameters()]


def trained(rank: int, run: Run, **more: Any) -> list[Tensor]:
    model = hybrid(run)
    optimizer = optimizer_of(run, model, **more)
    for step in range(run.steps):
        step_of(run, optimizer, model, pieces_of(run, step, [rank]))
    return weights_of(model)


@cache
def in_one_process(name: str) -> list[Tensor]:
    """m-SAM over the micro-batches of all groups, group by group."""
    run, model = RUNS[name], make_model().to(RUNS[name].dtype)
    optimizer = run.make(model if run.make is RWSAM else model.parameters(), **run.options)
    for step in range(run.steps):
        of_groups = [pieces_of(run, step, range(group * SHARDS, (group + 1) * SHARDS)) for group in range(GROUPS)]
        step_of(run, optimizer, model, [piece for pieces in of_groups for piece in pieces])
    return weights_of(model)


# --- beside the usual step ---


def radii_of_its_own(rank: int, run: Run) -> list[Tensor]:
    """Of a group: every rank makes the same collectives all the same."""
    radii = [[0.3, 0.0], [0.0, 0.3], [0.1, 0.2], [0.0, 0.0]]
    return trained(rank, run, rho=lambda t: radii[t - 1][rank // SHARDS], check_finite=False)


def not_finite(rank: int, run: Run, bad_pass: int) -> tuple[list[bool], int]:
    """Rank 2 has NaN in one pass. Whether the weights stay, by step."""
    model = hybrid(run)
    optimizer, stays, before = optimizer_of(run, model, check_finite=bad_pass > 0), [], weights_of(model)
    for step in range(3):
        passes = []

        def spoil(_: Any, args: tuple[Tensor], passes: list[None] = passes, step: int = step) -> tuple[Tensor] | None:
            passes.append(None)
            return (args[0] * torch.nan,) if rank == 2 and step == BAD_STEP and len(passes) == bad_pass + 1 else None

        hook = model.register_forward_pre_hook(spoil)
        step_of(run, optimizer, model, pieces_of(run, step, [rank]))
        hook.remove()
        stays.append(all(map(torch.equal, weights_of(model), before)))
        before = weights_of(model)
    return stays, optimizer.skipped_steps


def scaled(rank: int) -> tuple[list[Tensor], float]:
    """Weights after steps with a loss scale of which the second is skipped, and the scale."""
    run = RUNS["mix, float32"]
    model, scaler = hybrid(run), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = optimizer_of(run, model)
    for step in range(3):
        calls: list[None] = []

        def closure(step: int = step, calls: list[None] = calls) -> Tensor:
            calls.append(None)
            optimizer.zero_grad()
            inputs, targets = pieces_of(run, 2 * (step // 2), [rank])[0]
            loss: Tensor = (model(inputs) - targets).square().mean()
            scaler.scale(loss * (torch.nan if (rank, step, len(calls)) == (2, 1, 1) else 1.0)).backward()
            return loss

        optimizer.step(closure, grad_scaler=scaler)
        scaler.update()
    return weights_of(model), scaler.get_scale()


def counted(rank: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """All-reduces over the copies, by step; each of the two modules has one gradient to reduce."""
    run, counts, reduced = RUNS["SGD, micro-batches"], [], distributed.all_reduce
    model = hybrid(run)
    optimizer, copies = optimizer_of(run, model), [rank % SHARDS, rank % SHARDS + SHARDS]

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.extend([None] * (distributed.get_process_group_ranks(kwargs.get("group")) == copies))
        return reduced(tensor, *args, **kwargs)

    monkeypatch.setattr(distributed, "all_reduce", counting)
    for step in range(3):
        calls: list[None] = []
        step_of(run, optimizer, model, pieces_of(run, step, [rank]))
        counts.append(len(calls))
    return counts


def interrupted(rank: int) -> tuple[bool, list[Tensor]]:
    """The first pass raises. Whether the weights stay, and those of a run after it."""
    run = RUNS["SGD"]
    model = hybrid(run)
    optimizer, before = optimizer_of(run, model), weights_of(model)

    def raising() -> None:
        (model(pieces_of(run, 0, [rank])[0][0])).sum().backward()
        raise MemoryError("out of memory")

    with pytest.raises(MemoryError):
        optimizer.step(raising)
    stays = all(map(torch.equal, weights_of(model), before))
    for step in range(run.steps):
        step_of(run, optimizer, model, pieces_of(run, step, [rank]))
    return stays, weights_of(model)


def bfloat16_by_policy(rank: int) -> tuple[float, float, list[Tensor]]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    run = Run(dtype=torch.float32, fsdp=lambda: {"mp_policy": policy})
    model = hybrid(run)
    optimizer = optimizer_of(run, model)
    inputs, targets = pieces_of(run, 0, [rank])[0]
    return *thirty_steps_in_bfloat16(model, optimizer, inputs, targets), weights_of(model)


class Places(Gradient):
    """The places of the micro-batches, in the order of the first passes."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def begin(self, step: AscentStep) -> None:
        self.found.append(step.micro_batch)


def places(rank: int, run: Run) -> list[int]:
    direction = Places()
    trained(rank, run, direction=direction)
    return direction.found


def left_behind(rank: int) -> list[tuple[bool, bool]]:
    """Of what FSDP2 reduces over, after a step whose first pass was the model's first forward pass of all."""
    run = Run(steps=1)
    model = hybrid(run)
    step_of(run, optimizer_of(run, model), model, pieces_of(run, 0, [rank]))
    groups = [module._get_fsdp_state()._fsdp_param_groups[0] for module in (model, model[0])]
    return [(group._is_hsdp, group.post_forward_mesh_info is group.mesh_info) for group in groups]


def _all(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: trained(rank, run) for name, run in RUNS.items()}
    found["noise"] = trained(rank, Run(make=RSAM, options={**SGD, "sigma": 0.1}, k=2))
    found["own radii"] = radii_of_its_own(rank, Run(k=2))
    found["own radii, backward"] = radii_of_its_own(rank, Run(k=2, backward=True))
    found["not finite"] = [not_finite(rank, Run(k=k, backward=backward), bad) for k, backward, bad in NOT_FINITE]
    found["scaled"] = scaled(rank)
    with pytest.MonkeyPatch.context() as monkeypatch:
        found["counted"] = counted(rank, monkeypatch)
    found["interrupted"] = interrupted(rank)
    found["bfloat16"] = bfloat16_by_policy(rank)
    found["left behind"] = left_behind(rank)
    found["places"] = [places(rank, Run(k=2, steps=1, backward=backward)) for backward in (False, True)]
    return found


NOT_FINITE = [(1, False, 0), (1, False, 1), (2, False, 0), (2, False, 2), (1, True, 0), (1, True, 1)]  # k, by backward, which pass


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(_all, tmp_path_factory.mktemp("ranks"), ranks=RANKS)


@pytest.mark.parametrize("name", RUNS)
def test_a_local_ascent_is_m_sam_over_the_replica_groups(name: str, found: list[dict[str, Any]]) -> None:
    close = CLOSE if RUNS[name].dtype is torch.float64 else CLOSE_IN_FLOAT32
    assert largest_difference(found[0][name], in_one_process(name)) <= close


@pytest.mark.parametrize("name", [*RUNS, "noise", "own radii", "own radii, backward"])
def test_copies_are_equal_bit_for_bit(name: str, found: list[dict[str, Any]]) -> None:
    for each in found:
        assert all(map(torch.equal, each[name], found[0][name]))
        assert all(weight.isfinite().all() for weight in each[name])


def test_a_local_ascent_is_another_one(found: list[dict[str, Any]]) -> None:
    """Than that on the batch of all ranks, and noise is another one than none."""
    run, model = RUNS["SGD"], make_model()
    optimizer = SAM(model.parameters(), **run.options)
    for step in range(run.steps):
        step_of(run, optimizer, model, pieces_of(run, step, range(RANKS)))
    assert largest_difference(found[0]["SGD"], weights_of(model)) > 1e-6
    assert largest_difference(found[0]["noise"], found[0]["RSAM without noise"]) > 1e-6


def test_a_gradient_that_is_not_finite_in_one_group_skips_the_step_on_all(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["not finite"] == [([False, True, False], 1)] * len(NOT_FINITE)


def test_a_micro_batch_has_a_place_among_those_of_all_groups(found: list[dict[str, Any]]) -> None:
    """By which noise is drawn: group by group in a step of several micro-batches, in turns where calls are accumulated."""
    first, second = [[0, 1], [0, 2]], [[2, 3], [1, 3]]
    assert [each["places"] for each in found] == [first, first, second, second]


def test_the_loss_scale_is_the_same_on_all_ranks(found: list[dict[str, Any]]) -> None:
    run, model = RUNS["mix, float32"], make_model().float()
    optimizer = SAM(model.parameters(), **run.options)
    for step in (0, 2):  # the second step is skipped
        of_groups = [pieces_of(run, step, range(group * SHARDS, (group + 1) * SHARDS)) for group in range(GROUPS)]
        step_of(run, optimizer, model, [piece for pieces in of_groups for piece in pieces])
    for each in found:
        after, scale = each["scaled"]
        assert scale == 512.0
        assert largest_difference(after, weights_of(model)) <= CLOSE_IN_FLOAT32


def test_a_first_pass_reduces_nothing_over_the_copies(found: list[dict[str, Any]]) -> None:
    assert [each["counted"] for each in found] == [[2 * 2] * 3] * RANKS  # two second passes of two modules


def test_an_exception_in_the_first_pass_leaves_weights_and_meshes(found: list[dict[str, Any]]) -> None:
    for each in found:
        stays, after = each["interrupted"]
        assert stays
        assert all(map(torch.equal, after, each["SGD"]))
        assert each["left behind"] == [(True, False), (True, True)]  # the root module's weights stay after its forward pass


def test_a_policy_of_bfloat16_trains_float32_parameters(found: list[dict[str, Any]]) -> None:
    for each in found:
        first, last, after = each["bfloat16"]
        assert last < 0.8 * first
        assert all(map(torch.equal, after, found[0]["bfloat16"][2]))
        assert after[0].dtype is torch.float32
