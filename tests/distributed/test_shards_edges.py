"""FSDP2's shards beside the usual step: gathered weights that stay, NaN on one rank, exceptions, loss scaling, policies."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from sam_kernels import SAM
from tests.distributed.sharded_problem import (
    CASES,
    batch_of,
    closure_of,
    fully_sharded,
    largest_difference,
    make_model,
    run,
    thirty_steps_in_bfloat16,
    whole,
)
from tests.helpers.ranks import on_ranks, one_at_a_time

pytestmark = one_at_a_time
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "rho": 0.1}
STEPS = 5
CLOSE = 1e-12  # as in test_shards.py
CLOSE_IN_FLOAT32 = 2e-5  # some hundred roundings of 6e-8

Attempt = Callable[[int, int], Any]
ATTEMPTS: dict[str, Attempt] = {}


def attempt(function: Attempt) -> Attempt:
    """Called on every rank, with the rank and the number of ranks; the test of that name gets what all of them return."""
    ATTEMPTS[function.__name__] = function
    return function


def _all_attempts(rank: int) -> dict[str, Any]:
    found = {}
    for name, function in ATTEMPTS.items():
        try:
            found[name] = function(rank, distributed.get_world_size())
        except Exception as error:  # what a rank raises is what its test is about
            found[name] = f"{type(error).__name__}: {error}"
        distributed.barrier()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    on_all = on_ranks(_all_attempts, tmp_path_factory.mktemp("ranks"))
    return {name: [each[name] for each in on_all] for name in ATTEMPTS}


def sharded(**options: Any) -> nn.Module:
    return fully_sharded(make_model(), init_device_mesh("cpu", (distributed.get_world_size(),)), **options)


def weights(model: nn.Module) -> list[Tensor]:
    return [whole(param) for param in model.parameters()]


@cache
def in_one_process(steps: int = STEPS) -> list[Tensor]:
    model = make_model()
    run(CASES["SAM, SGD"], model, [(0, 1)], steps)
    return weights(model)


# --- gathered weights ---


@attempt
def gathered_weights_stay_after_backward(rank: int, ranks: int) -> list[Tensor]:
    model = sharded()
    model.set_reshard_after_backward(False)
    run(CASES["SAM, SGD"], model, [(rank, ranks)], STEPS)
    return weights(model)


@attempt
def gathered_weights_stay_after_a_forward_pass(rank: int, ranks: int) -> list[Tensor]:
    model = sharded(reshard_after_forward=False)
    optimizer = SAM(model.parameters(), torch.optim.SGD, **SGD)
    closure = closure_of(optimizer, model)

    def measured(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = closure(inputs, targets)
        with torch.no_grad():
            model(inputs)
        return loss

    for step in range(STEPS):
        batch = batch_of(step, rank, ranks)
        optimizer.step(lambda batch=batch: measured(*batch))
    return weights(model)


@attempt
def parameters_on_the_cpu_by_policy(rank: int, ranks: int) -> list[Tensor]:
    model = sharded(offload_policy=CPUOffloadPolicy(pin_memory=False))
    run(CASES["SAM, SGD"], model, [(rank, ranks)], STEPS)
    return weights(model)


@attempt
def activation_checkpointing(rank: int, ranks: int) -> list[Tensor]:
    model = make_model()
    model[0] = checkpoint_wrapper(model[0])  # type: ignore[index,operator]
    fully_sharded(model, init_device_mesh("cpu", (ranks,)))
    run(CASES["SAM, SGD"], model, [(rank, ranks)], STEPS)
    return weights(model)


@attempt
def compiled_model(rank: int, ranks: int) -> list[Tensor]:
    model = sharded()
    optimizer = SAM(model.parameters(), torch.optim.SGD, **SGD)
    closure = closure_of(optimizer, torch.compile(model, backend="aot_eager"))
    for step in range(STEPS):
        batch = batch_of(step, rank, ranks)
        optimizer.step(lambda batch=batch: closure(*batch))
    return weights(model)


@attempt
def ordinary_parameters_beside_shards(rank: int, ranks: int) -> list[Tensor]:
    """One layer is sharded. The others are replicas whose gradients the closure averages."""
    model = make_model()
    fully_shard(model[0], mesh=init_device_mesh("cpu", (ranks,)))  # type: ignore[index]
    optimizer = SAM(model.parameters(), torch.optim.SGD, **SGD)
    closure = closure_of(optimizer, model)

    def averaged(*batch: Tensor) -> Tensor:
        loss = closure(*batch)
        for param in list(model.parameters())[2:]:
            distributed.all_reduce(param.grad)
            param.grad /= ranks  # type: ignore[operator]
        return loss

    for step in range(STEPS):
        batch = batch_of(step, rank, ranks)
        optimizer.step(lambda batch=batch: averaged(*batch))
    return weights(model)


SAME = [
    gathered_weights_stay_after_backward,
    gathered_weights_stay_after_a_forward_pass,
    parameters_on_the_cpu_by_policy,
    activation_checkpointing,
    compiled_model,
    ordinary_parameters_beside_shards,
]


@pytest.mark.parametrize("name", SAME)
def test_weights_are_those_of_one_process(name: Attempt, found: Any) -> None:
    for each in found[name.__name__]:
        assert not isinstance(each, str), each
        assert largest_difference(each, in_one_process()) <= CLOSE


@attempt
def bfloat16_by_policy(rank: int, ranks: int) -> tuple[float, float, torch.dtype]:
    model = make_model().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_sharded(model, init_device_mesh("cpu", (ranks,)), mp_policy=policy)
    optimizer = SAM(model.parameters(), torch.optim.SGD, **SGD)
    inputs, targets = (tensor.float() for tensor in batch_of(0, rank, ranks))
    return *thirty_steps_in_bfloat16(model, optimizer, inputs, targets), next(model.parameters()).dtype


def test_a_policy_of_bfloat16_trains_float32_parameters(found: Any) -> None:
    for first, last, dtype in found["bfloat16_by_policy"]:
        assert last < 0.8 * first
        assert dtype is torch.float32


# --- what is not finite, and exceptions ---


def _spoiled(model: nn.Module, closure: Callable[..., Tensor], rank: int, call: int) -> Callable[..., Tensor]:
    """The closure, with NaN in the first gradient of rank 1 after one of its calls."""
    calls: list[None] = []

    def spoiled(*batch: Tensor) -> Tensor:
        loss = closure(*batch)
        calls.append(None)
        if rank == 1 and len(calls) == call:
            grad: Any = next(model.parameters()).grad
            grad._local_tensor.view(-1)[0] = torch.nan
        return loss

    return spoiled


def _skips(rank: int, ranks: int, call: int, *, by_backward: bool) -> tuple[bool, int]:
    model = sharded()
    before = weights(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, **SGD)
    closure = _spoiled(model, closure_of(optimizer, model, zeroes=not by_backward), rank, call)
    batch = batch_of(0, rank, ranks)
    if by_backward:
        optimizer.backward(lambda: closure(*batch))
        optimizer.step()
    else:
        optimizer.step(lambda: closure(*batch))
    return all(map(torch.equal, weights(model), before)), optimizer.skipped_steps


@attempt
def not_finite(rank: int, ranks: int) -> list[tuple[bool, int]]:
    return [_skips(rank, ranks, call, by_backward=by_backward) for call in (1, 2) for by_backward in (False, True)]


def test_nan_on_one_rank_skips_the_step_on_all(found: Any) -> None:
    assert found["not_finite"] == [[(True, 1)] * 4] * 2


@attempt
def exception_in_the_second_pass(rank: int, ranks: int) -> tuple[bool, list[Tensor]]:
    model = sharded()
    before, calls = weights(model), 0
    optimizer = SAM(model.parameters(), torch.optim.SGD, **SGD)
    closure = closure_of(optimizer, model)

    def raising() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError("out of memory")
        return closure(*batch_of(0, rank, ranks))

    with pytest.raises(MemoryError):
        optimizer.step(raising)
    restored = all(map(torch.equal, weights(model), before))
    run(CASES["SAM, SGD"], model, [(rank, ranks)], STEPS, optimizer)
    return restored, weights(model)


def test_an_exception_in_the_second_pass_restores_the_weights_and_training_goes_on(found: Any) -> None:
    for restored, after in found["exception_in_the_second_pass"]:
        assert restored
        assert largest_difference(after, in_one_process()) <= CLOSE


# --- closures ---


@attempt
def closure_that_does_not_zero(rank: int, ranks: int) -> None:
    model = sharded()
    optimizer = SAM(model.parameters(), torch.optim.SGD, **SGD)
    closure, batch = closure_of(optimizer, model, zeroes=False), batch_of(0, rank, ranks)
    optimizer.step(lambda: closure(*batch))


@attempt
def gradients_that_are_not_reduced(rank: int, ranks: int) -> None:
    model: Any = sharded()
    model.set_requires_gradient_sync(False)
    optimizer = SAM(model.parameters(), torch.optim.SGD, **SGD)
    closure, batch = closure_of(optimizer, model, zeroes=False), batch_of(0, rank, ranks)
    optimizer.backward(lambda: closure(*batch))


@attempt
def closure_that_computes_nothing(rank: int, ranks: int) -> None:
    model = sharded()
    optimizer = SAM(model.parameters(), torch.optim.SGD, **SGD)
    optimizer.step(lambda: model(batch_of(0, rank, ranks)[0]).sum())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (closure_that_does_not_zero, "RuntimeError: SAM.step: the closure added its gradient to one that was in .grad before"),
        (closure_that_computes_nothing, "RuntimeError: SAM.step: the closure left no gradient of its own"),
        (gradients_that_are_not_reduced, "RuntimeError: SAM.backward: the closure left no gradient"),
    ],
)
def test_closures_that_do_not_do_their_part_are_errors(name: Attempt, words: str, found: Any) -> None:
    assert all(each.startswith(words) for each in found[name.__name__]), found[name.__name__]


@attempt
def closure_that_zeroes_in_place(rank: int, ranks: int) -> list[Tensor]:
    model = sharded()
    optimizer = SAM(model.parameters(), torch.optim.SGD, **SGD)
    closure = closure_of(optimizer, model, zeroes=False)

    def zeroing(*batch: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        return closure(*batch)

    for step in range(STEPS):
        batch = batch_of(step, rank, ranks)
        optimizer.step(lambda batch=batch: zeroing(*batch))
    return weights(model)


def test_gradients_may_be_zeroed_in_place(found: Any) -> None:
    for each in found["closure_that_zeroes_in_place"]:
        assert not isinstance(each, str), each
        assert largest_difference(each, in_one_process()) <= CLOSE


# --- loss scaling ---


def _scaled(scaler: Any, model: nn.Module, part: int, parts: int) -> list[Tensor]:
    optimizer = SAM(model.parameters(), torch.optim.SGD, **SGD)

    def closure(*batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (model(batch[0]) - batch[1]).square().mean()
        scaler.scale(loss).backward()
        return loss

    for step in range(STEPS):
        batch = [tensor.float() for tensor in batch_of(step, part, parts)]
        optimizer.step(lambda batch=batch: closure(*batch), grad_scaler=scaler)
        scaler.update()
        closure(*batch)
        optimizer.first_step(zero_grad=True, grad_scaler=scaler)
        closure(*batch)
        scaler.step(optimizer)
        scaler.update()
    return weights(model)


def _scalers() -> list[Any]:
    return [torch.amp.GradScaler("cpu", init_scale=1024.0), ShardedGradScaler(device="cpu", init_scale=1024.0)]


@attempt
def loss_scaling(rank: int, ranks: int) -> list[list[Tensor]]:
    mesh = init_device_mesh("cpu", (ranks,))
    return [_scaled(scaler, fully_sharded(make_model().float(), mesh), rank, ranks) for scaler in _scalers()]


def test_scaled_losses_make_the_steps_of_one_process(found: Any) -> None:
    expected = _scaled(_scalers()[0], make_model().float(), 0, 1)
    for on_rank in found["loss_scaling"]:
        assert not isinstance(on_rank, str), on_rank
        for each in on_rank:
            assert largest_difference(each, expected) <= CLOSE_IN_FLOAT32
