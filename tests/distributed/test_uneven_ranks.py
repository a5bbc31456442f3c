"""Ranks with other gradients, losses or parameters than the rest: no rank waits for another, and none goes on with other numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from sam_kernels import ASAM, GCSAM, GSAM, SAM, SAMSPS, WSAM, FriendlySAM, LookSAM, VaSSO
from sam_kernels.optim._shards.dtensor import local_of
from sam_kernels.optim._shards.layout import Layout, Meshes
from sam_kernels.schedules import AscentInfo, Radius
from tests.distributed.sharded_problem import closure_of, largest_difference, make_model
from tests.helpers.ranks import on_ranks, one_at_a_time

pytestmark = one_at_a_time
RANKS, STEPS = 2, 4
SGD: dict[str, Any] = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "rho": 0.1}
CLOSE = 1e-12  # as in test_shards.py: one more sum for each norm


class ByLoss(Radius):
    """0.1 times the loss, or without one 0.2."""

    def radius(self, info: AscentInfo) -> Any:
        return 0.2 if info.loss is None else 0.1 * info.loss


# --- a rank without a gradient ---

Way = Callable[[Any, Callable[[], float]], Any]


def _step(optimizer: Any, closure: Callable[[], float]) -> Any:
    return optimizer.step(closure)


def _backward(optimizer: Any, closure: Callable[[], float]) -> None:
    optimizer.zero_grad()
    optimizer.backward(closure)
    optimizer.step()


def _micro_batches(optimizer: Any, closure: Callable[[], float]) -> Any:
    return optimizer.step([closure, closure])


WAYS: dict[str, tuple[Any, dict[str, Any], Way]] = {
    "SAM": (SAM, {**SGD, "momentum": 0.9}, _step),
    "SAM, clipped": (SAM, {**SGD, "max_grad_norm": 0.3}, _step),
    "SAM, unchecked": (SAM, {**SGD, "check_finite": False}, _step),
    "SAM, backward": (SAM, SGD, _backward),
    "m-SAM": (SAM, SGD, _micro_batches),
    "ASAM, AdamW": (ASAM, {**SGD, "base_optimizer": torch.optim.AdamW}, _step),
    "GSAM": (GSAM, SGD, _step),
    "WSAM, coupled": (WSAM, {**SGD, "decoupled": False}, _step),
    "WSAM": (WSAM, SGD, _step),
    "LookSAM": (LookSAM, {**SGD, "k": 2}, _step),
    "VaSSO": (VaSSO, SGD, _step),
    "FriendlySAM": (FriendlySAM, SGD, _step),
    "GCSAM": (GCSAM, SGD, _step),
    "SAMSPS": (SAMSPS, {"gamma_b": 1.0, "rho": 0.1}, _step),
}
KINDS = ("ordinary", "DTensors")


def _param(rank: int, kind: str) -> nn.Parameter:
    values = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64).view(4, 3) + rank
    if kind == "ordinary":
        return nn.Parameter(values)
    mesh = init_device_mesh("cpu", (RANKS,))
    return nn.Parameter(DTensor.from_local(values, mesh, [Shard(0)], run_check=False))


def _closure(optimizer: Any, param: Any, *, has_gradient: bool = True, zeroes: bool = True, loss: Any = 1.5) -> Callable[[], Any]:
    def closure() -> Any:
        if zeroes:
            optimizer.zero_grad()
        if has_gradient:
            grad = local_of(param).detach().cos() + local_of(param).detach()
            if isinstance(param, DTensor):
                grad = DTensor.from_local(grad, param.device_mesh, param.placements, run_check=False)
            param.grad = grad
        return loss

    return closure


def _run(name: str, param: Any, lacks_in: tuple[int, ...], **more: Any) -> Tensor:
    """Steps, without a gradient in some of them."""
    make, options, way = WAYS[name]
    optimizer = make([param], **options, **more)
    for step in range(STEPS):
        closure = _closure(optimizer, param, has_gradient=step not in lacks_in, zeroes=way is not _backward)
        if step not in lacks_in or more or isinstance(param, DTensor):
            way(optimizer, closure)
    return local_of(param).detach().clone()


def _without_gradients(rank: int, name: str, kind: str) -> tuple[Tensor, Tensor]:
    """Rank 1 never has a gradient; and it has none in the first two steps."""
    more = {"process_group": distributed.group.WORLD} if kind == "ordinary" else {}
    never = _run(name, _param(rank, kind), tuple(range(STEPS)) if rank == 1 else (), **more)
    return never, _run(name, _param(rank, kind), (0, 1) if rank == 1 else (), **more)


# --- errors that all ranks raise ---


def _no_gradient_anywhere(rank: int) -> None:
    param = _param(rank, "DTensors")
    optimizer = SAM([param], **SGD)
    optimizer.step(_closure(optimizer, param, has_gradient=False))


def _no_gradient_anywhere_by_backward(rank: int) -> None:
    param = _param(rank, "DTensors")
    optimizer = SAM([param], **SGD)
    optimizer.backward(_closure(optimizer, param, has_gradient=False, zeroes=False))


def _ordinary_beside_shards(rank: int, other: Any = None, **options: Any) -> tuple[bool, int]:
    param, beside = _param(rank, "DTensors"), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SAM([param, beside], **SGD, **options)
    inner = _closure(optimizer, param)

    def closure() -> Any:
        loss = inner()
        beside.grad = torch.ones_like(beside) if rank == 0 else other
        return loss

    optimizer.step(closure)
    return torch.equal(local_of(param), local_of(_param(rank, "DTensors"))), optimizer.skipped_steps


def _hardly_unlike_beside_shards(rank: int) -> tuple[bool, int]:
    return _ordinary_beside_shards(rank, torch.full((3,), 1.001, dtype=torch.float64))


def _not_finite_beside_shards(rank: int) -> tuple[bool, int]:
    return _ordinary_beside_shards(rank, torch.full((3,), torch.nan, dtype=torch.float64), check_finite=False)


def _loss_on_one_rank(rank: int) -> None:
    param = _param(rank, "DTensors")
    optimizer = SAM([param], **{**SGD, "rho": ByLoss()})
    optimizer.step(_closure(optimizer, param, loss=1.0 if rank == 0 else None))


def _loss_of_one_replica(rank: int) -> None:
    ddp = DistributedDataParallel(make_model())
    optimizer = SAM(ddp.parameters(), **{**SGD, "rho": ByLoss()}, model=ddp)
    closure = closure_of(optimizer, ddp)

    def without_loss() -> Any:
        loss = closure(torch.ones(2, 5, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64))
        return loss if rank == 0 else None

    optimizer.step(without_loss)


def _smaller_meshes(rank: int) -> None:
    """A parameter on a mesh of this rank alone, and one on the mesh of both: a norm would be another one on each rank."""
    alone = [DeviceMesh("cpu", [each]) for each in range(RANKS)][rank]
    own = nn.Parameter(DTensor.from_local(torch.full((2,), 1.0 + 3.0 * rank, dtype=torch.float64), alone, [Shard(0)], run_check=False))
    param = _param(rank, "DTensors")
    optimizer = SAM([param, own], **SGD)
    closures = [_closure(optimizer, each, zeroes=False) for each in (param, own)]

    def closure() -> float:
        optimizer.zero_grad()
        return sum(each() for each in closures)

    optimizer.step(closure)


def _group_of_shards(rank: int) -> None:
    SAM([_param(rank, "DTensors")], **SGD, process_group=distributed.group.WORLD)


def _group_of_replicas(rank: int) -> None:
    ddp = DistributedDataParallel(make_model())
    SAM(ddp.parameters(), **SGD, model=ddp, process_group=distributed.group.WORLD)


def _replicas_of_shards(rank: int) -> None:
    """torch makes ordinary tensors of the parts."""
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(make_model(), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    SAM(DistributedDataParallel(model, device_mesh=mesh["data"]).parameters(), **SGD)


def _frozen_elsewhere(rank: int) -> None:
    """A frozen parameter on a mesh without this rank is nobody's business; a trainable one is refused."""
    other = [DeviceMesh("cpu", [each]) for each in range(RANKS)][1 - rank]
    elsewhere = nn.Parameter(DTensor.from_local(torch.ones(2), other, [Shard(0)], run_check=False), requires_grad=False)
    param = _param(rank, "DTensors")
    optimizer = SAM([param, elsewhere], **SGD)
    optimizer.step(_closure(optimizer, param))
    SAM([elsewhere.requires_grad_()], **SGD)


ERRORS: dict[str, tuple[Callable[[int], Any], str]] = {
    "no gradient anywhere": (_no_gradient_anywhere, "RuntimeError: SAM.step: the closure left no gradient of its own"),
    "no gradient, backward": (_no_gradient_anywhere_by_backward, "RuntimeError: SAM.backward: the closure left no gradient"),
    "ordinary beside shards": (_ordinary_beside_shards, "RuntimeError: SAM: gradients of ordinary tensors"),
    "hardly unlike beside shards": (_hardly_unlike_beside_shards, "RuntimeError: SAM: gradients of ordinary tensors"),
    "smaller meshes": (_smaller_meshes, "RuntimeError: SAM: gradients of ordinary tensors (or of DTensors on smaller meshes)"),
    "group of shards": (_group_of_shards, "ValueError: SAM: process_group has the ranks ["),
    "group of replicas": (_group_of_replicas, "ValueError: SAM: process_group has the ranks ["),
    "replicas of shards": (_replicas_of_shards, "TypeError: SAM: parameter param_groups[0]['params'][0] is a part of a DTensor"),
    "elsewhere": (_frozen_elsewhere, "TypeError: SAM: parameter param_groups[0]['params'][0] is a DTensor on DeviceMesh("),
    "loss on one rank": (
        _loss_on_one_rank,
        "RuntimeError: SAM: the closure returned a loss, a number or a tensor of one element, on 1 of 2",
    ),
    "loss of one replica": (_loss_of_one_replica, "RuntimeError: SAM: the closure returned a loss"),
}


# --- what goes on ---


def _loss_of_the_last_stage(rank: int) -> float:
    """The radius follows a loss that the last stage alone has."""
    param = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SAM([param], **{**SGD, "rho": ByLoss()}, process_group=distributed.group.WORLD)
    seen: list[Tensor] = []
    closure = _closure(optimizer, param, loss=3.0 if rank == 1 else None)

    def seeing() -> Any:
        seen.append(param.detach().clone())
        return closure()

    optimizer.step(seeing)
    return (seen[1] - seen[0]).norm().item()


def _no_losses(rank: int) -> bool:
    param = _param(rank, "DTensors")
    optimizer = SAM([param], **{**SGD, "rho": ByLoss()})
    optimizer.step(_closure(optimizer, param, loss=None))
    return not torch.equal(local_of(param), local_of(_param(rank, "DTensors")))


def _group_without_parameters(rank: int) -> int:
    """The only group with a radius has no parameter on rank 1."""
    param = nn.Parameter(torch.ones(3, dtype=torch.float64))
    groups = [{"params": [param]}, {"params": []}] if rank == 0 else [{"params": []}, {"params": [param], "rho": 0.0}]
    optimizer = SAM(groups, **SGD, process_group=distributed.group.WORLD)
    calls = 0
    inner = _closure(optimizer, param)

    def closure() -> Any:
        nonlocal calls
        calls += 1
        return inner()

    optimizer.step(closure)
    return calls


def _group_of_the_mesh(rank: int) -> bool:
    """A mesh may have a group of its own over all ranks, with a timeout or a backend of its own."""
    group = distributed.new_group()
    mesh, used = DeviceMesh.from_group(group, "cpu"), []

    def all_reduce(tensor: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> None:
        used.append(group)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(distributed, "all_reduce", all_reduce)
        Meshes([Layout(mesh, 1, 0)]).sum_of_numbers([])
    return used == [group]


GOES_ON: dict[str, Callable[[int], Any]] = {
    "not finite beside shards": _not_finite_beside_shards,
    "loss of the last stage": _loss_of_the_last_stage,
    "no losses": _no_losses,
    "group without parameters": _group_without_parameters,
    "group of the mesh": _group_of_the_mesh,
}


def _all(rank: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name in WAYS:
        for kind in KINDS:
            found[name, kind] = _without_gradients(rank, name, kind)
    for name, (function, _) in ERRORS.items():
        try:
            found[name] = function(rank)
        except Exception as error:  # what a rank raises is what its test is about
            found[name] = f"{type(error).__name__}: {error}"
    return found | {name: function(rank) for name, function in GOES_ON.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return on_ranks(_all, tmp_path_factory.mktemp("ranks"), ranks=RANKS, timeout=120.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WAYS)
def test_a_rank_without_a_gradient_adds_nothing_to_the_step(name: str, kind: str, found: Any) -> None:
    (first, first_late), (other, other_late) = (on_rank[name, kind] for on_rank in found)
    alone = _run(name, _param(0, "ordinary"), ())
    assert largest_difference([first], [alone]) <= CLOSE
    assert torch.equal(other, local_of(_param(1, "ordinary")))
    assert not torch.equal(other_late, other)
    assert not torch.equal(first_late, first)  # the norm is that of both, once both have gradients


@pytest.mark.parametrize("name", ERRORS)
def test_all_ranks_raise_alike(name: str, found: Any) -> None:
    assert all(on_rank[name].startswith(ERRORS[name][1]) for on_rank in found), [on_rank[name] for on_rank in found]


def test_ordinary_gradients_that_are_not_finite_on_one_rank_skip_the_step_on_all(found: Any) -> None:
    assert [on_rank["not finite beside shards"] for on_rank in found] == [(True, 1)] * RANKS


def test_a_radius_follows_the_loss_of_the_stage_that_has_one(found: Any) -> None:
    for on_rank in found:  # both stages have the same gradient, so each has half of the square
        assert on_rank["loss of the last stage"] == pytest.approx(0.3 / 2**0.5, rel=CLOSE)


def test_a_radius_needs_no_loss_where_no_rank_has_one(found: Any) -> None:
    assert [on_rank["no losses"] for on_rank in found] == [True] * RANKS


def test_a_group_that_is_empty_on_one_rank_makes_both_passes_there(found: Any) -> None:
    assert [on_rank["group without parameters"] for on_rank in found] == [2] * RANKS


def test_sums_use_the_group_of_the_mesh(found: Any) -> None:
    assert [on_rank["group of the mesh"] for on_rank in found] == [True] * RANKS
