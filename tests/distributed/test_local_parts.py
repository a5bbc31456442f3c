"""The usual path over DTensors reads attributes alone, and leaves the unexpected to the slow path. One process is enough to see it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from sam_kernels import SAM, _dispatch
from sam_kernels._backend import Backend
from sam_kernels._tensor_list import TensorList
from sam_kernels.backends import foreach
from sam_kernels.backends.triton._contents import PythonContents
from sam_kernels.optim._engine import kept_lists
from tests.helpers.ranks import on_one_rank

native = pytest.importorskip("sam_kernels.backends.native.cpu")
_cpu = pytest.importorskip("sam_kernels._cpu", reason="the native core is not built")
BACKENDS = [native.BACKEND, foreach.BACKEND]
CONTENTS = [PythonContents, _cpu.AnyTensorList, _cpu.TensorList]
SIZES = [(4, 3), (5,), (2, 2)]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    with on_one_rank(tmp_path_factory.mktemp("group")):
        yield init_device_mesh("cpu", (1,))


def placed(local: Tensor, mesh: DeviceMesh, placement: Any) -> DTensor:
    made: DTensor = DTensor.from_local(local, mesh, [placement], run_check=False)
    return made


def sharded(local: Tensor, mesh: DeviceMesh) -> DTensor:
    return placed(local, mesh, Shard(0))


def make_owners(mesh: DeviceMesh) -> list[Any]:
    owners = [nn.Parameter(sharded(torch.ones(size), mesh)) for size in SIZES]
    for i, owner in enumerate(owners):
        owner.grad = sharded(torch.full(SIZES[i], float(i)), mesh)
    return owners


def locals_of(owners: list[Any]) -> list[Tensor]:
    return [owner._local_tensor for owner in owners]


# --- what is noticed ---

Change = Callable[[list[Any], DeviceMesh], None]


def no_gradient(owners: list[Any], mesh: DeviceMesh) -> None:
    owners[1].grad = None


def ordinary_gradient(owners: list[Any], mesh: DeviceMesh) -> None:
    owners[1].grad = torch.ones(5)


def gradient_with_other_placements(owners: list[Any], mesh: DeviceMesh) -> None:
    owners[1].grad = placed(torch.ones(5), mesh, Replicate())


def gradient_under_way(owners: list[Any], mesh: DeviceMesh) -> None:
    pending = collectives.all_reduce(torch.ones(5), "sum", mesh)
    assert type(pending) is not Tensor
    owners[1].grad = DTensor(pending, owners[1]._spec, requires_grad=False)


def sparse_gradient(owners: list[Any], mesh: DeviceMesh) -> None:
    owners[1].grad = DTensor(torch.ones(5).to_sparse(), owners[1]._spec, requires_grad=False)


def replaced_local_tensor(owners: list[Any], mesh: DeviceMesh) -> None:
    owners[1]._local_tensor = owners[1]._local_tensor.clone()


def one_parameter_less(owners: list[Any], mesh: DeviceMesh) -> None:
    owners.pop()


def other_order(owners: list[Any], mesh: DeviceMesh) -> None:
    owners.reverse()


def moved_local_tensor(owners: list[Any], mesh: DeviceMesh) -> None:
    owners[1]._local_tensor.data = torch.ones(5)


OF_GRADIENTS = [no_gradient, ordinary_gradient, gradient_with_other_placements, gradient_under_way, sparse_gradient]
OF_OWNERS = [replaced_local_tensor, one_parameter_less, other_order]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda each: each.name)
def test_the_local_gradients_are_those_of_the_owners(backend: Backend, mesh: DeviceMesh) -> None:
    owners = make_owners(mesh)
    known = backend.trust(locals_of(owners))
    assert known is not None
    owners[1].grad._spec = copy.copy(owners[1]._spec)  # equal, and another object
    found = backend.current_local_grads(known, owners)
    assert isinstance(found, TensorList)
    assert [id(grad) for grad in found] == [id(owner.grad._local_tensor) for owner in owners]


@pytest.mark.parametrize("change", [*OF_GRADIENTS, *OF_OWNERS], ids=lambda each: each.__name__)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda each: each.name)
def test_other_gradients_and_other_owners_are_left_to_the_slow_path(backend: Backend, change: Change, mesh: DeviceMesh) -> None:
    owners = make_owners(mesh)
    known = backend.trust(locals_of(owners))
    assert known is not None
    change(owners, mesh)
    assert backend.current_local_grads(known, owners) is None
    assert backend.are_locals_of(known, owners) is (change in OF_GRADIENTS)
    if change is gradient_under_way:
        owners[1].grad._local_tensor.wait()  # or torch warns at the end


@pytest.mark.parametrize("contents", CONTENTS, ids=lambda each: each.__name__)
def test_what_is_read_of_owners_is_what_is_read_of_their_local_parts(contents: type, mesh: DeviceMesh) -> None:
    owners = make_owners(mesh)
    known = contents(locals_of(owners))
    assert known.are_locals_of(owners)
    assert known.are_locals_of(locals_of(owners))
    grads, described = known.current_local_grads(owners)
    assert [id(grad) for grad in grads] == [id(owner.grad._local_tensor) for owner in owners]
    assert described.is_current(grads)
    moved_local_tensor(owners, mesh)
    assert not known.are_locals_of(owners)
    assert known.current_local_grads(owners) is None


@pytest.mark.parametrize("contents", CONTENTS, ids=lambda each: each.__name__)
def test_gradients_of_another_size_are_none(contents: type, mesh: DeviceMesh) -> None:
    owners = make_owners(mesh)
    known = contents(locals_of(owners))
    owners[1].grad = DTensor(torch.ones(6), owners[1]._spec, requires_grad=False)
    assert known.current_local_grads(owners) is None


# --- steps ---


def take_step(optimizer: Any, params: list[Any], mesh: DeviceMesh | None, change: Change | None = None) -> None:
    """One step. ``change`` is made before each half of it."""
    for half in (optimizer.first_step, optimizer.second_step):
        for i, param in enumerate(params):
            local = torch.linspace(-1.0, 2.0 + i, param.numel()).reshape(SIZES[i])
            param.grad = local if mesh is None else sharded(local, mesh)
        if change is not None:
            change(params, mesh)  # type: ignore[arg-type]
        half()


def forget_second(params: list[Any], mesh: DeviceMesh | None) -> None:
    params[1].grad = None


def place_otherwise(params: list[Any], mesh: DeviceMesh) -> None:
    params[1].grad = placed(params[1].grad._local_tensor, mesh, Replicate())


def bring_under_way(params: list[Any], mesh: DeviceMesh) -> None:
    pending = collectives.all_reduce(params[1].grad._local_tensor, "sum", mesh)
    params[1].grad = DTensor(pending, params[1]._spec, requires_grad=False)


# By name: what happens to the gradients of DTensors in one step, and what is the same for ordinary tensors.
CHANGES: dict[str, tuple[Change | None, Any]] = {
    "none": (None, None),
    "no gradient": (forget_second, forget_second),
    "other placements": (place_otherwise, None),
    "under way": (bring_under_way, None),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_steps_are_those_over_ordinary_tensors(base: Any, at: int, name: str, mesh: DeviceMesh) -> None:
    """Bit for bit: on one rank there is nothing to sum, and the square of a float32 number is exact in float64."""
    options: dict[str, Any] = {"lr": 0.1, "rho": 0.2, **({"momentum": 0.9} if base is torch.optim.SGD else {})}
    owners, tensors = make_owners(mesh), [nn.Parameter(torch.ones(size)) for size in SIZES]
    of_shards, of_tensors = (SAM(params, base, **options) for params in (owners, tensors))
    change, same = CHANGES[name]
    for step in range(3):
        take_step(of_shards, owners, mesh, change if step == at else None)
        take_step(of_tensors, tensors, None, same if step == at else None)
    for owner, tensor in zip(owners, tensors, strict=True):
        assert torch.equal(owner._local_tensor, tensor)


def test_a_local_tensor_that_was_replaced_is_the_one_that_is_stepped(mesh: DeviceMesh) -> None:
    owners, tensors = make_owners(mesh), [nn.Parameter(torch.ones(size)) for size in SIZES]
    of_shards, of_tensors = (SAM(params, torch.optim.AdamW, lr=0.1, rho=0.2) for params in (owners, tensors))
    take_step(of_shards, owners, mesh)
    take_step(of_tensors, tensors, None)
    before = owners[1]._local_tensor
    kept = before.clone()
    owners[1]._local_tensor = before.detach().clone()
    average = of_shards.base_optimizer.state[owners[2]]["exp_avg"]
    average._local_tensor = average._local_tensor.clone()
    take_step(of_shards, owners, mesh)
    take_step(of_tensors, tensors, None)
    assert torch.equal(before, kept)
    for owner, tensor in zip(owners, tensors, strict=True):
        assert torch.equal(owner._local_tensor, tensor)
        for key in ("exp_avg", "exp_avg_sq"):
            state, right = (each.base_optimizer.state[param][key] for each, param in ((of_shards, owner), (of_tensors, tensor)))
            assert torch.equal(state._local_tensor, right)


def test_an_ordinary_gradient_is_refused_after_steps_too(mesh: DeviceMesh) -> None:
    owners = make_owners(mesh)
    optimizer = SAM(owners, torch.optim.SGD, lr=0.1, rho=0.2)
    take_step(optimizer, owners, mesh)
    before = [local.clone() for local in locals_of(owners)]
    with pytest.raises(
        TypeError, match=r"gradient of parameter param_groups\[0\]\['params'\]\[1\] is an ordinary tensor and the parameter"
    ):
        take_step(optimizer, owners, mesh, ordinary_gradient)
    assert all(map(torch.equal, locals_of(owners), before))


def test_an_owner_with_the_same_local_tensor_is_another_parameter(mesh: DeviceMesh) -> None:
    owners = make_owners(mesh)
    optimizer = SAM(owners, torch.optim.SGD, lr=0.1, rho=0.2, momentum=0.9)
    take_step(optimizer, owners, mesh)
    other: Any = nn.Parameter(DTensor(owners[1]._local_tensor, owners[1]._spec, requires_grad=False))
    assert other is not owners[1]
    optimizer.param_groups[0]["params"][1] = owners[1] = other
    assert other not in optimizer.base_optimizer.state
    take_step(optimizer, owners, mesh)
    assert other in optimizer.base_optimizer.state  # the momentum is its own


def test_the_usual_step_takes_the_usual_path(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is described anew, and no operation is dispatched on a DTensor."""
    assert _dispatch.select("cpu") is native.BACKEND
    owners = make_owners(mesh)
    optimizer = SAM(owners, torch.optim.AdamW, lr=0.1, rho=0.2)
    for _ in range(2):
        take_step(optimizer, owners, mesh)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the slow path, or an operation on a DTensor")

    for half in (optimizer.first_step, optimizer.second_step):
        for i, owner in enumerate(owners):
            owner.grad = sharded(torch.full(SIZES[i], 0.5), mesh)
        with monkeypatch.context() as patched:
            patched.setattr(kept_lists, "local_grad", never)
            patched.setattr(kept_lists, "GroupLists", never)
            patched.setattr(native.BACKEND, "trust", never)
            patched.setattr(DTensor, "__torch_dispatch__", never)
            half()
