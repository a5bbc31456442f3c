"""What replicas and shards would do silently otherwise is refused, by name and before a weight moves. One process is enough to see it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sam_kernels import ASAM, GSAM, RSAM, RWSAM, S2SAM, SAM, SAMSPS, WSAM, FriendlySAM, LookSAM, MomentumSAM, VaSSO
from sam_kernels.optim import descents, directions
from sam_kernels.optim._shards.dtensor import local_of
from sam_kernels.schedules import AdaptivePolicy
from tests.distributed.problem import batch_of, losses_of, make_model, weights_of
from tests.helpers.ranks import on_one_rank

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    with on_one_rank(tmp_path):
        yield


def replicated(**kwargs: Any) -> DistributedDataParallel:
    return DistributedDataParallel(make_model(), **kwargs)


def closure_of(optimizer: Any, model: nn.Module) -> Callable[..., torch.Tensor]:
    def closure(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = losses_of(model, inputs, targets).mean()
        loss.backward()
        return loss

    return closure


# --- a local ascent ---


@pytest.mark.parametrize("as_model", [None, "module", "list"])
def test_a_local_ascent_needs_replicas(as_model: str | None) -> None:
    model = make_model()
    given = {None: None, "module": model, "list": [model, nn.Identity()]}[as_model]
    with pytest.raises(
        ValueError, match=r"needs a DistributedDataParallel module, or one of fully_shard .*, got model=.*model=ddp, local_ascent=True"
    ):
        SAM(model.parameters(), torch.optim.SGD, model=given, local_ascent=True, **SGD)
    with pytest.raises(ValueError, match="needs a DistributedDataParallel module"):
        RWSAM(model, torch.optim.SGD, beta=1.0, local_ascent=True, **SGD)


def test_a_local_ascent_needs_a_process_group(group: None) -> None:
    ddp = replicated()
    distributed.destroy_process_group()
    with pytest.raises(ValueError, match=r"call torch\.distributed\.init_process_group first"):
        SAM(ddp.parameters(), torch.optim.SGD, model=ddp, local_ascent=True, **SGD)


def test_a_local_ascent_is_a_flag(group: None) -> None:
    ddp = replicated()
    with pytest.raises(TypeError, match="local_ascent"):
        SAM(ddp.parameters(), torch.optim.SGD, model=ddp, local_ascent=1, **SGD)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (GSAM, "gsam"),
        (WSAM, "wsam"),
        (LookSAM, "looksam"),
        (VaSSO, "vasso"),
        (FriendlySAM, "friendly"),
        (MomentumSAM, "momentum"),
        (S2SAM, "stale"),
    ],
)
def test_parts_that_use_numbers_of_one_rank_are_refused_by_name(group: None, make: Any, name: str) -> None:
    ddp = replicated()
    with pytest.raises(ValueError, match=f"local ascent with (descent|direction) '{name}'"):
        make(ddp.parameters(), torch.optim.SGD, rho=0.1, model=ddp, local_ascent=True, **SGD)
    make(ddp.parameters(), torch.optim.SGD, rho=0.1, model=ddp, **SGD)


def test_a_policy_that_every_rank_would_decide_for_itself_is_refused(group: None) -> None:
    ddp = replicated()
    optimizer = SAM(ddp.parameters(), torch.optim.SGD, rho=AdaptivePolicy(0.1), model=ddp, local_ascent=True, **SGD)
    with pytest.raises(ValueError, match="AdaptivePolicy with a local ascent: each rank would decide by a norm of its own"):
        optimizer.step(closure_of(optimizer, ddp), batch=batch_of(0, 0, 1), micro_batches=1)


def test_so_is_the_polyak_step_size(group: None) -> None:
    ddp = replicated()
    with pytest.raises(ValueError, match="local ascent with descent 'polyak'"):
        SAMSPS(ddp.parameters(), model=ddp, local_ascent=True)
    with pytest.raises(ValueError, match="local ascent with descent 'polyak'"):
        RWSAM(ddp, torch.optim.SGD, beta=1.0, lr=0.1, descent=descents.Polyak())
    with pytest.raises(ValueError, match="local ascent with direction 'vasso'"):
        RWSAM(ddp, torch.optim.SGD, beta=1.0, lr=0.1, direction=directions.VarianceSuppressed())


def test_a_static_graph_is_refused(group: None) -> None:
    ddp = replicated(static_graph=True)
    with pytest.raises(ValueError, match=r"static_graph=True.*leave static_graph out"):
        SAM(ddp.parameters(), torch.optim.SGD, model=ddp, local_ascent=True, **SGD)
    with pytest.raises(ValueError, match=r"static_graph=True.*leave static_graph out"):
        RWSAM(ddp, torch.optim.SGD, beta=1.0, **SGD)
    with pytest.raises(ValueError, match=r"local_ascent=False.*static_graph=True.*leave static_graph out"):
        RWSAM(ddp, torch.optim.SGD, beta=1.0, local_ascent=False, **SGD)
    ddp = replicated()
    optimizer = SAM(ddp.parameters(), torch.optim.SGD, model=ddp, local_ascent=True, **SGD)
    ddp._set_static_graph()  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match="static_graph=True"):
        optimizer.step(closure_of(optimizer, ddp), batch=batch_of(0, 0, 1))


def test_a_static_graph_with_first_passes_that_are_averaged_inside_of_no_sync(group: None) -> None:
    ddp = replicated(static_graph=True)
    optimizer = SAM(ddp.parameters(), torch.optim.SGD, model=ddp, **SGD)
    before = weights_of(ddp)
    with (
        ddp.no_sync(),
        pytest.raises(ValueError, match=r"backward under no_sync\(\).*static_graph=True.*leave static_graph out, or no_sync"),
    ):
        optimizer.backward(lambda: losses_of(ddp, *batch_of(0, 0, 1)).mean().backward())
    assert all(map(torch.equal, weights_of(ddp), before))
    assert ddp.require_backward_grad_sync


def test_uneven_inputs_are_refused(group: None) -> None:
    ddp = replicated()
    optimizer = SAM(ddp.parameters(), torch.optim.SGD, model=ddp, **SGD)
    start = weights_of(ddp)
    with ddp.join(), pytest.raises(RuntimeError, match=r"DistributedDataParallel.join\(\) is not supported"):
        optimizer.step(closure_of(optimizer, ddp), batch=batch_of(0, 0, 1))
    assert all(map(torch.equal, start, weights_of(ddp)))


@pytest.mark.parametrize("two_steps", [False, True])
def test_an_ascent_that_is_averaged_after_all_is_refused(group: None, two_steps: bool) -> None:
    ddp = replicated()
    optimizer = SAM(ddp.parameters(), torch.optim.SGD, model=ddp, local_ascent=True, **SGD)
    start, act = weights_of(ddp), optimizer.first_step
    if two_steps:
        closure_of(optimizer, ddp)(*batch_of(0, 0, 1))
    else:  # it passes the replicated module by
        act = partial(optimizer.step, closure_of(optimizer, ddp.module), batch=batch_of(0, 0, 1))
    with pytest.raises(RuntimeError, match=r"first pass did not run under no_sync\(\).*with ddp.no_sync\(\):"):
        act()
    assert all(map(torch.equal, start, weights_of(ddp)))


@pytest.mark.parametrize("make", [GSAM, VaSSO])
@pytest.mark.parametrize("two_steps", [False, True])
def test_a_kept_gradient_of_one_rank_is_refused(group: None, make: Any, two_steps: bool) -> None:
    ddp = replicated()
    optimizer = make(ddp.parameters(), torch.optim.SGD, rho=0.1, model=ddp, **SGD)
    closure, start = closure_of(optimizer, ddp), weights_of(ddp)

    def alone() -> torch.Tensor:
        with ddp.no_sync():
            return closure(*batch_of(0, 0, 1))

    act = optimizer.first_step
    if two_steps:
        alone()
    else:
        act = partial(optimizer.step, lambda: closure(*batch_of(0, 0, 1)), ascent_closure=alone)
    with pytest.raises(RuntimeError, match=r"needs the gradient of all ranks in the first pass.*no_sync\(\)"):
        act()
    assert all(map(torch.equal, start, weights_of(ddp)))


def test_micro_batches_without_a_backward_pass_are_an_error(group: None) -> None:
    ddp = replicated()
    optimizer = SAM(ddp.parameters(), torch.optim.SGD, model=ddp, local_ascent=True, rho=0.0, **SGD)
    closure = closure_of(optimizer, ddp)
    with pytest.raises(RuntimeError, match=r"ran no backward pass.*call loss.backward\(\)"):
        optimizer.step([lambda: closure(*batch_of(0, 0, 1)), lambda: None])


def test_a_copy_of_the_optimizer_has_the_copy_of_the_replicas(group: None) -> None:
    ddp = replicated()
    pair = copy.deepcopy((ddp, SAM(ddp.parameters(), torch.optim.SGD, model=ddp, local_ascent=True, **SGD)))
    other, optimizer = pair
    optimizer.step(closure_of(optimizer, other), batch=batch_of(0, 0, 2), micro_batches=2)
    assert not torch.equal(weights_of(other)[0], weights_of(ddp)[0])
    closure_of(optimizer, other)(*batch_of(0, 0, 1))  # averaged: the copy's own ascent is refused
    with pytest.raises(RuntimeError, match=r"did not run under no_sync\(\)"):
        optimizer.first_step()


# --- shards ---


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_parameters_of_fsdp1_are_refused(group: None, use_orig_params: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process is not sharded, and FSDP1 is deprecated
        model: Any = FullyShardedDataParallel(make_model(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    words = r"sharded by FullyShardedDataParallel \(FSDP1\); the norm of a shard .*ZeroRedundancyOptimizer"
    with pytest.raises(TypeError, match=words):
        SAM(model.parameters(), torch.optim.SGD, **SGD)
    with pytest.raises(TypeError, match=words):
        SAM(model.parameters(), torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = SAM(make_model().parameters(), torch.optim.SGD, **SGD)
    with pytest.raises(TypeError, match=words):
        optimizer.add_param_group({"params": list(model.parameters())})
    assert len(optimizer.param_groups) == 1


def test_sam_inside_of_zero_is_refused(group: None) -> None:
    params = list(make_model().parameters())
    words = r"made inside ZeroRedundancyOptimizer.*SAM\(ddp.parameters\(\), ZeroRedundancyOptimizer, optimizer_class="
    for make in (SAM, ASAM, RSAM):
        with pytest.raises(TypeError, match=words):
            ZeroRedundancyOptimizer(params, make, base_optimizer=torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match=words):
        ZeroRedundancyOptimizer(params, partial(SAM, base_optimizer=torch.optim.SGD), lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=words):
        ZeroRedundancyOptimizer(params, lambda shard, **options: SAM(shard, torch.optim.SGD, **options), lr=0.1)  # type: ignore[arg-type]


# --- DTensors ---


def test_sums_that_no_rank_has_are_refused_by_name(group: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    param = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()], run_check=False))
    with pytest.raises(TypeError, match=r"parameter 'head\.weight' is a DTensor with placements .*redistribute it"):
        SAM([("head.weight", param)], torch.optim.SGD, **SGD)


def test_a_gradient_of_another_kind_is_refused_by_name(group: None) -> None:
    sharded = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)])
    param = nn.Parameter(sharded)
    optimizer = SAM([("head.weight", param)], torch.optim.SGD, **SGD)
    param.grad = torch.ones(4)
    with pytest.raises(TypeError, match=r"gradient of parameter 'head\.weight' is an ordinary tensor and the parameter is a DTensor"):
        optimizer.first_step()
    assert torch.equal(sharded.to_local(), torch.ones(4))


def test_reweighting_over_parts_of_samples_gradients_is_refused(group: None) -> None:
    model = fully_shard(make_model(), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match=r"norms='jvp': parameter '0\.weight' is a DTensor.*finite_difference"):
        RWSAM(model, torch.optim.SGD, beta=1.0, norms="jvp", **SGD)
    with pytest.raises(ValueError, match="RWSAM: process_group is not supported"):
        RWSAM(make_model(), torch.optim.SGD, beta=1.0, process_group=distributed.group.WORLD, **SGD)


def test_what_was_gathered_for_a_forward_pass_is_no_parameter(group: None) -> None:
    model = fully_shard(make_model(), mesh=init_device_mesh("cpu", (1,)))
    with torch.no_grad():
        model(torch.ones(1, model[0].in_features, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"parameter '0\.weight' is what fully_shard has gathered.*reshard\(\)"):
        SAM(list(model.parameters()), torch.optim.SGD, **SGD)
    SAM(model.parameters(), torch.optim.SGD, **SGD)  # freed by the attempt


def test_graphs_over_shards_are_refused(group: None) -> None:
    model = fully_shard(make_model(), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="capturable=True is not supported with DTensors"):
        SAM(model.parameters(), torch.optim.SGD, capturable=True, **SGD)


def test_a_mesh_is_no_process_group(group: None) -> None:
    with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed\.ProcessGroup, got .*mesh\.get_group\(dim\)"):
        SAM(make_model().parameters(), torch.optim.SGD, process_group=init_device_mesh("cpu", (1,)), **SGD)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["replicas", "shards", "stages"])
def test_a_step_after_the_process_group_is_gone_is_an_error(group: None, kind: str) -> None:
    model: nn.Module = make_model()
    more: dict[str, Any] = {}
    if kind == "replicas":
        more["model"] = model = DistributedDataParallel(model)
    elif kind == "shards":
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    else:
        more["process_group"] = distributed.group.WORLD
    optimizer = SAM(model.parameters(), torch.optim.SGD, **SGD, **more)
    start = [param.detach().clone() for param in model.parameters()]
    distributed.destroy_process_group()
    with pytest.raises(RuntimeError, match=r"the process group is gone \(destroy_process_group was called\)"):
        optimizer.step(closure_of(optimizer, model), batch=batch_of(0, 0, 1))
    assert all(torch.equal(local_of(param), local_of(before)) for param, before in zip(model.parameters(), start, strict=True))


def test_parameters_without_memory_beside_shards_are_refused_by_name(group: None) -> None:
    param = nn.Parameter(distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)]))
    beside = nn.Parameter(torch.empty(3, device="meta"))
    optimizer = SAM([("head.weight", param), ("head.bias", beside)], torch.optim.SGD, **SGD)

    def closure() -> None:
        param.grad, beside.grad = torch.ones_like(param), torch.ones_like(beside)

    with pytest.raises(TypeError, match=r"parameter 'head\.bias' is on the meta device and has no memory"):
        optimizer.step(closure)
    assert torch.equal(local_of(param), torch.ones(4))
