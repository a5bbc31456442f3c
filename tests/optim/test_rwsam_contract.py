"""RW-SAM holds the behaviours in docs/internals/contracts.md that SAM holds; the rows are numbered as there."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from torch import Tensor, nn

from sam_kernels import RWSAM, SAM, use_backend
from sam_kernels.operations import Operands, RandomPerturb
from sam_kernels.validation.backends import backend_of
from tests.optim.problem import BACKENDS, assert_same_bits, every_backend, every_base, twin, weights
from tests.optim.rwsam_problem import (
    CALLS,
    WAYS,
    B,
    Recorded,
    assert_close,
    build,
    every_way,
    group_grads,
    losses_of,
    make_batch,
    make_model,
    norms_of,
    skip_without_norms,
    state_of,
    train,
)

# 1, 2, 3: checkpoints and copies


@every_way
@every_base
def test_row_01_save_load_continue_is_bit_exact(base: Any, kwargs: dict[str, Any], way: str) -> None:
    model = make_model(torch.float32)
    optimizer = build(model, way, base, **kwargs)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed_model = make_model(torch.float32)
    resumed_model.load_state_dict(saved["model"])
    resumed = build(resumed_model, way, base, **{**kwargs, "beta": 0.5})
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["beta"] == 2.0
    train(model, optimizer, range(3, 6))
    train(resumed_model, resumed, range(3, 6))
    assert_same_bits(weights(resumed_model), weights(model))


@every_way
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_row_02_copies_continue_alike(how: str, way: str) -> None:
    model = make_model(torch.float32)
    optimizer = build(model, way, momentum=0.9)
    train(model, optimizer, range(2))
    pair = (model, optimizer)
    other_model, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert other.model is other_model
    train(model, optimizer, range(2, 4))
    train(other_model, other, range(2, 4))
    assert_same_bits(weights(other_model), weights(model))


def test_row_02_add_param_group() -> None:
    model = make_model()
    optimizer = RWSAM(model, torch.optim.SGD, beta=2.0, params=model[0].parameters(), rho=0.2, lr=0.1)
    batch = make_batch()
    optimizer.step(lambda: losses_of(model, batch))
    assert_close(optimizer.last_norms, norms_of(group_grads(make_model(), batch), {0, 1}.__contains__))
    optimizer.add_param_group({"params": model[4].parameters()})
    assert optimizer.param_groups[1]["beta"] == 2.0
    grads = group_grads(model, batch)
    optimizer.step(lambda: losses_of(model, batch))
    assert_close(optimizer.last_norms, norms_of(grads, {0, 1, 4, 5}.__contains__))
    with pytest.raises(ValueError, match="beta must be a finite number"):
        optimizer.add_param_group({"params": model[1].parameters(), "beta": float("nan")})
    optimizer.param_groups[1]["beta"] = 3.0
    with pytest.raises(ValueError, match="different values of beta"):
        optimizer.step(lambda: losses_of(model, batch))


def test_row_02_hooks_schedulers_and_plain_steps() -> None:
    model = make_model(torch.float32)
    optimizer = build(model, "exact")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(model, optimizer, range(1))
    scheduler.step()
    assert calls == ["pre", "post"]
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert optimizer.step() is None  # no closure: the base's own step, along .grad as it is


def test_row_03_distributed_checkpoint_keeps_the_momentum() -> None:
    model = make_model(torch.float32)
    optimizer = build(model, "exact", momentum=0.9)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    resumed_model = make_model(torch.float32)
    resumed_model.load_state_dict(model.state_dict())
    resumed = build(resumed_model, "exact", momentum=0.9)
    dcp.get_optimizer_state_dict(resumed_model, resumed)
    dcp.set_optimizer_state_dict(resumed_model, resumed, saved)
    train(model, optimizer, range(3, 5))
    train(resumed_model, resumed, range(3, 5))
    assert_same_bits(weights(resumed_model), weights(model))


# 6: 16 bits


@pytest.mark.parametrize("way", ["exact", "last_layer"])
@pytest.mark.parametrize("how", ["parameters", "autocast"])
def test_row_06_sixteen_bits(way: str, how: str) -> None:
    exact, batch = make_model(), make_batch()
    model = make_model(torch.bfloat16 if how == "parameters" else torch.float32)
    inputs, labels = batch[0].to(next(model.parameters()).dtype), batch[1]

    def losses() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if how == "autocast" else nullcontext():
            return nn.functional.cross_entropy(model(inputs).float(), labels, reduction="none")

    optimizer = build(model, way)
    optimizer.step(losses)
    counted: Callable[[int], bool] = {4, 5}.__contains__ if way == "last_layer" else lambda _: True
    assert optimizer.last_norms is not None
    assert optimizer.last_norms.dtype is torch.float32
    assert_close(optimizer.last_norms, norms_of(group_grads(exact, batch), counted), 0.03)
    assert all(param.isfinite().all() for param in model.parameters())


# 7: what raises


@every_backend
@pytest.mark.parametrize(("way", "at"), [(way, at) for way in WAYS for at in range(CALLS[way])])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_row_07_a_closure_that_raises_leaves_everything(backend: str, way: str, at: int, error: BaseException) -> None:
    skip_without_norms(backend, way)
    model, batch = make_model(torch.float32, batch_norm=True), make_batch(torch.float32)
    pointers = [param.data_ptr() for param in model.parameters()]
    with use_backend(backend):
        optimizer = build(model, way)
        train(model, optimizer, range(2))
        before, statistics = weights(model), [buffer.clone() for buffer in model.buffers()]
        closure = Recorded(model, batch, error, at)
        with pytest.raises(type(error)):
            optimizer.step(closure)
        assert len(closure.calls) == at + 1
        assert [param.data_ptr() for param in model.parameters()] == pointers
        assert_same_bits(weights(model), before)
        if at < CALLS[way] - 1:  # no forward pass was finished at w, which would have been the one to change a buffer
            assert_same_bits(list(model.buffers()), statistics)
        assert not any(module._forward_hooks for module in model.modules())
        good = Recorded(model, batch)
        optimizer.step(good)
    assert_same_bits(good.calls[-2], before)
    assert not torch.equal(weights(model)[0], before[0])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("done", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("interrupted_call", range(4))
def test_row_07_interrupt_around_a_random_perturbation(
    monkeypatch: pytest.MonkeyPatch, name: str, done: float, interrupted_call: int
) -> None:
    """Of two groups and two directions: the first of them saves, the second starts from what is saved."""
    if done == 0.5 and interrupted_call < 2:
        pytest.skip("where weights are being saved, a tensor is either done or not")
    model, batch = make_model(torch.float32), make_batch(torch.float32)
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[4].parameters())}]
    optimizer = build(model, "finite_difference", params=groups)
    backend = backend_of(name)
    real, calls = backend.operations[RandomPerturb], []

    def random_perturb_(op: RandomPerturb, lists: Operands) -> None:
        calls.append(1)
        if len(calls) != 5 + interrupted_call or done:
            real(op, lists)
        if len(calls) == 5 + interrupted_call:
            if done == 0.5:
                lists["params"][0].detach().flatten()[1::2] = lists["old_params"][0].flatten()[1::2]
            raise KeyboardInterrupt

    monkeypatch.setitem(backend.operations, RandomPerturb, random_perturb_)
    with use_backend(name):
        optimizer.step(partial(losses_of, model, batch))
        before = weights(model)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(partial(losses_of, model, batch))
        assert_same_bits(weights(model), before)
        optimizer.step(partial(losses_of, model, batch))
    assert not torch.equal(weights(model)[0], before[0])


# 8, 9, 10, 11


@every_backend
@pytest.mark.parametrize(("way", "bad_pass"), [(way, bad) for way in WAYS for bad in range(CALLS[way])])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_row_08_one_sample_that_is_not_finite_skips_the_step(backend: str, way: str, bad: float, bad_pass: int) -> None:
    """Whether it was drawn or not, and in whichever pass."""
    skip_without_norms(backend, way)
    model, batch = make_model(torch.float32), make_batch(torch.float32)
    passes = 0

    def closure() -> Tensor:
        nonlocal passes
        factor = torch.ones(B)
        factor[7] = bad if passes == bad_pass else 1.0
        passes += 1
        return losses_of(model, batch) * factor

    with use_backend(backend):
        optimizer = build(model, way, momentum=0.9)
        train(model, optimizer, range(1))
        before, state = weights(model), state_of(optimizer)
        optimizer.step(closure)
        assert_same_bits(weights(model), before)
        assert_same_bits(state_of(optimizer), state)
        assert optimizer.skipped_steps == 1
        optimizer.step(closure)
        assert optimizer.skipped_steps == 1
    assert not torch.equal(weights(model)[0], before[0])


@every_way
def test_row_09_zero_gradients_give_no_nan(way: str) -> None:
    model, batch = make_model(torch.float32), make_batch(torch.float32)
    before = weights(model)
    optimizer = build(model, way)
    optimizer.step(lambda: losses_of(model, batch) * 0.0)
    assert_same_bits(weights(model), before)
    assert optimizer.skipped_steps == 0
    assert_close(optimizer.last_weights, torch.full((B,), 1 / B), 1e-6)


@every_way
@every_base
def test_row_10_rho_zero_everywhere_is_the_base_optimizer_bit_for_bit(base: Any, kwargs: dict[str, Any], way: str) -> None:
    model = make_model(torch.float32)
    other = twin(model)
    optimizer, plain = build(model, way, base, **{**kwargs, "rho": 0.0}), base(other.parameters(), **kwargs)
    for step in range(3):
        closure = Recorded(model, make_batch(torch.float32, seed=step))
        optimizer.step(closure)
        assert len(closure.calls) == 1
        plain.zero_grad()
        losses_of(other, closure.batch).mean().backward()
        plain.step()
        assert_same_bits(weights(model), weights(other))


@pytest.mark.parametrize("way", ["exact", "last_layer"])
def test_row_11_capturable_steps_have_the_same_bits(way: str) -> None:
    model = make_model(torch.float32)
    other = twin(model)
    ours, theirs = (build(each, way, capturable=capturable, beta=lambda t: 0.5 * t) for each, capturable in ((model, True), (other, False)))
    train(model, ours, range(3))
    train(other, theirs, range(3))
    assert_same_bits(weights(model), weights(other))
    model, other = make_model(torch.float32), make_model(torch.float32)
    groups = [[{"params": each[i].parameters()} for i in (0, 1, 4)] for each in (model, other)]
    ours = build(model, way, capturable=True, params=groups[0])
    theirs = build(other, way, params=groups[1])
    train(model, ours, range(2))
    train(other, theirs, range(2))
    assert_same_bits(weights(model), weights(other))
    shared = ours.param_groups[0]["beta"]
    assert isinstance(shared, Tensor)
    assert all(group["beta"] is shared for group in ours.param_groups)
    saved = ours.state_dict()
    ours.load_state_dict(saved)
    theirs.load_state_dict(saved)
    train(model, ours, range(2))
    train(other, theirs, range(2))
    assert_same_bits(weights(model), weights(other))
    plain = build(make_model(torch.float32), way, capturable=True, beta=0.0)
    assert plain.param_groups[0]["beta"] == 0.0
    assert not isinstance(plain.param_groups[0]["beta"], Tensor)
    for refused in ({"norms": "finite_difference"}, {"norms": "jvp"}, {"sampling": "draw"}):
        with pytest.raises(ValueError, match="capturable=True needs exact norms"):
            build(make_model(), "exact", capturable=True, **refused)


# 12, 13: statistics, masks, clipping


@every_way
def test_row_12_both_passes_see_the_same_masks_when_asked(way: str) -> None:
    model = make_model(torch.float32, dropout=0.5)
    seen: list[Tensor] = []
    model[3].register_forward_hook(lambda module, args, output: seen.append(output.detach() != 0))
    train(model, build(model, way, preserve_rng_state=True), range(1))
    assert all(torch.equal(mask, seen[0]) for mask in seen)
    seen.clear()
    train(model, build(model, way), range(1))
    assert not torch.equal(seen[-1], seen[-2])


@every_way
def test_row_12_statistics_are_updated_once_a_closure(way: str) -> None:
    model = make_model(torch.float32, batch_norm=True)
    batch = make_batch(torch.float32)
    optimizer = build(model, way)
    optimizer.step([lambda: losses_of(model, batch)] * 3)
    assert model[1].num_batches_tracked == 3


@every_way
def test_row_13_the_descent_gradient_is_clipped(way: str) -> None:
    model = make_model(torch.float32)
    before = weights(model)
    train(model, build(model, way, max_grad_norm=1e-3, lr=1.0), range(1))
    length = torch.stack([(a - b).square().sum() for a, b in zip(before, weights(model), strict=True)]).sum().sqrt()
    assert length.item() == pytest.approx(1e-3, rel=1e-2)


@every_way
def test_memory_can_be_released(way: str) -> None:
    """What a step leaves is the backups, and the directions of "jvp": as many elements as parameters each."""
    model = make_model(torch.float32)
    optimizer = build(model, way)
    size = sum(param.numel() for param in model.parameters())

    def held() -> int:
        gc.collect()
        shapes = [param.shape for param in model.parameters()]
        others = {id(each) for param in model.parameters() for each in (param, param.grad)}
        tensors = [each for each in gc.get_objects() if type(each) is Tensor and not each.is_nested]
        return sum(each.numel() for each in tensors if each.shape in shapes and id(each) not in others)

    before = held()
    train(model, optimizer, range(2))
    copies = 2 if way == "jvp" else 1
    assert held() - before >= copies * size
    optimizer.release_buffers()
    assert held() - before < size // 2
    train(model, optimizer, range(2))


@pytest.mark.filterwarnings("ignore:RWSAM. norms='finite_difference' of a forward pass in 16 bits")
@every_way
@pytest.mark.parametrize("kind", [RWSAM, SAM])
def test_autocast_around_the_whole_step_sees_every_perturbation(kind: Any, way: str) -> None:
    """Its cached casts of the weights are thrown away when these are written."""
    model, batch = make_model(torch.float32), make_batch(torch.float32)
    seen: list[float] = []

    def losses() -> Tensor:
        found = losses_of(model, batch)
        seen.append(found.detach().mean().item())
        return found

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = losses().mean()
        loss.backward()
        return loss

    optimizer: Any = build(model, way, delta=0.05) if kind is RWSAM else SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(losses if kind is RWSAM else closure)
        optimizer.step(losses if kind is RWSAM else closure)
    assert len(set(seen)) == len(seen) - (2 if way == "jvp" and kind is RWSAM else 0)  # of "jvp" one pass is at w too
