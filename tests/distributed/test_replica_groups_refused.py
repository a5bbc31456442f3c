"""Where a local ascent over replica groups cannot be one, it is refused by name and before a weight moves. One process shows it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from sam_kernels import GSAM, RSAM, SAM, SAMSPS, WSAM, FriendlySAM, LookSAM, MomentumSAM, VaSSO
from sam_kernels.optim._shards import replica_groups
from tests.distributed.sharded_problem import batch_of, closure_of, make_model, whole
from tests.helpers.ranks import on_one_rank

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "rho": 0.1}
NAMES = ("replicate", "shard")


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    with on_one_rank(tmp_path):
        yield


def hybrid() -> Any:
    return fully_shard(make_model(), mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=NAMES))


def local(params: Any, model: Any, **more: Any) -> Any:
    return SAM(params, torch.optim.SGD, model=model, local_ascent=True, **SGD, **more)


def test_shards_without_copies_are_refused() -> None:
    model = fully_shard(make_model(), mesh=init_device_mesh("cpu", (1,)))
    for given in (model, [nn.Identity(), model]):
        with pytest.raises(ValueError, match=r"needs replica groups, and the mesh of FSDPSequential .*no rank has a gradient of the whole"):
            local(model.parameters(), given)


def test_tensor_parallel_parts_are_refused() -> None:
    mesh = init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=(*NAMES, "tensor"))
    model: Any = parallelize_module(make_model(), mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh[NAMES])
    with pytest.raises(ValueError, match=r"is for meshes \(replicate, shard\), and FSDPSequential has a parameter with placements"):
        local(model.parameters(), model)


def test_modules_on_several_meshes_are_refused() -> None:
    models = [fully_shard(make_model(), mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=names)) for names in (NAMES, ("a", "b"))]
    with pytest.raises(ValueError, match=r"needs all modules on one mesh \(replicate, shard\)"):
        local([param for model in models for param in model.parameters()], models)


def test_a_process_group_is_refused() -> None:
    model = hybrid()
    with pytest.raises(ValueError, match="over HSDP and process_group"):
        local(model.parameters(), model, process_group=distributed.group.WORLD)


@pytest.mark.parametrize(
    ("make", "name"),
    [(GSAM, "gsam"), (WSAM, "wsam"), (LookSAM, "looksam"), (VaSSO, "vasso"), (FriendlySAM, "friendly"), (MomentumSAM, "momentum")],
)
def test_parts_that_use_numbers_of_one_group_are_refused_by_name(make: Any, name: str) -> None:
    model = hybrid()
    with pytest.raises(ValueError, match=f"local ascent with (descent|direction) '{name}'"):
        make(model.parameters(), torch.optim.SGD, model=model, local_ascent=True, **SGD)


def test_so_is_the_polyak_step_size() -> None:
    model = hybrid()
    with pytest.raises(ValueError, match="local ascent with descent 'polyak'"):
        SAMSPS(model.parameters(), model=model, local_ascent=True)


@pytest.mark.parametrize("how", ["step", "backward"])
def test_a_parameter_that_the_modules_do_not_reduce_is_refused_by_name(how: str) -> None:
    model, other = hybrid(), hybrid()
    params = [("ours", next(model.parameters())), ("other's", next(other.parameters()))]
    optimizer, start = local(params, model), [whole(param) for _, param in params]
    closures = [closure_of(optimizer, each, zeroes=False) for each in (model, other)]

    def closure() -> torch.Tensor:
        losses = [each(*batch_of(0, 0, 1)) for each in closures]
        return losses[0] + losses[1]

    with pytest.raises(ValueError, match=r'parameter "other\'s" is none that the modules in model= shard.*pass the root module'):
        optimizer.step(closure) if how == "step" else optimizer.backward(closure)
    assert all(map(torch.equal, start, [whole(param) for _, param in params]))


@pytest.mark.parametrize("make", [SAM, RSAM])
def test_the_two_step_api_is_refused(make: Any) -> None:
    model = hybrid()
    optimizer = make(model.parameters(), torch.optim.SGD, model=model, local_ascent=True, **SGD)
    start = [whole(param) for param in model.parameters()]
    closure_of(optimizer, model)(*batch_of(0, 0, 1))
    for act in (optimizer.first_step, *([optimizer.random_step] if make is RSAM else [])):
        with pytest.raises(RuntimeError, match=r"over HSDP needs step\(closure\) or backward\(closure\)"):
            act()
    assert all(map(torch.equal, start, [whole(param) for param in model.parameters()]))


def test_a_gradient_that_is_still_to_be_all_reduced_is_refused() -> None:
    model = hybrid()
    optimizer = local(model.parameters(), model)
    closure, batch = closure_of(optimizer, model), batch_of(0, 0, 1)
    start = [whole(param) for param in model.parameters()]
    model.set_requires_all_reduce(False)
    closure(*batch)
    model.set_requires_all_reduce(True)
    with pytest.raises(RuntimeError, match=r"holds a gradient of a backward pass with set_requires_all_reduce\(False\)"):
        optimizer.step(partial(closure, *batch))
    assert all(map(torch.equal, start, [whole(param) for param in model.parameters()]))
    closure(*batch)  # all-reduces both
    optimizer.step(partial(closure, *batch))


def test_a_second_pass_that_is_not_all_reduced_is_an_error() -> None:
    model = hybrid()
    optimizer = local(model.parameters(), model)
    start = [whole(param) for param in model.parameters()]
    model.set_requires_all_reduce(False)
    with pytest.raises(RuntimeError, match="the closure left no gradient of its own"):
        optimizer.step(partial(closure_of(optimizer, model), *batch_of(0, 0, 1)))
    assert all(map(torch.equal, start, [whole(param) for param in model.parameters()]))


@pytest.mark.parametrize("used", ["_USED", "_USED_OF_MESHES"])
def test_another_fsdp2_is_refused(used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hybrid()
    optimizer = local(model.parameters(), model)
    monkeypatch.setattr(replica_groups, used, ("mesh_info", "not_there") if used == "_USED" else ("mesh", "not_there"))
    words = r"needs FSDP2 as it is in torch 2\.13, and torch .*'not_there'"
    with pytest.raises(RuntimeError, match=words):
        local(model.parameters(), model)
    with pytest.raises(RuntimeError, match=words):
        optimizer.step(partial(closure_of(optimizer, model), *batch_of(0, 0, 1)))


def test_another_class_of_meshes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hybrid()
    optimizer = local(model.parameters(), model)
    monkeypatch.delitem(sys.modules, "torch.distributed.fsdp._fully_shard._fsdp_common")
    with pytest.raises(RuntimeError, match=r"needs FSDP2 as it is in torch 2\.13"):
        optimizer.step(partial(closure_of(optimizer, model), *batch_of(0, 0, 1)))


def test_a_group_that_does_not_follow_its_mesh_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hybrid()
    optimizer = local(model.parameters(), model)
    group = model._get_fsdp_state()._fsdp_param_groups[0]
    whole_mesh = group.mesh_info
    monkeypatch.setattr(type(group), "_is_hsdp", True)
    with pytest.raises(RuntimeError, match="a group of parameters does not follow its mesh_info"):
        optimizer.step(partial(closure_of(optimizer, model), *batch_of(0, 0, 1)))
    assert group.mesh_info is whole_mesh


def test_modules_that_were_sharded_together_are_reduced_once() -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=NAMES)
    model: Any = make_model()
    fully_shard([model[0], model[2]], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer, single = local(model.parameters(), [model, model[0]]), make_model()
    expected = SAM(single.parameters(), torch.optim.SGD, **SGD)
    for step in range(3):
        optimizer.step(partial(closure_of(optimizer, model), *batch_of(step, 0, 1)))
        expected.step(partial(closure_of(expected, single), *batch_of(step, 0, 1)))
    for left, right in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(whole(left), right.detach(), rtol=1e-12, atol=1e-12)


def test_a_first_pass_gathers_from_the_parts_of_any_other_pass() -> None:
    """Where the mesh after a forward pass is the same, FSDP2 keeps no second set of parts."""
    model: Any = fully_shard(make_model(), mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=NAMES), reshard_after_forward=True)
    groups = replica_groups.ReplicaGroups([model])
    group = model._get_fsdp_state()._fsdp_param_groups[0]
    with groups.without_all_reduce():
        assert (group._is_hsdp, group._reshard_after_forward, group._use_post_forward_mesh) == (False, True, False)
    assert (group._is_hsdp, group._reshard_after_forward, group._use_post_forward_mesh) == (True, True, False)
