"""Every member under a ``torch.amp.GradScaler``: powers of two change nothing, an overflow skips and halves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels import schedules
from sam_kernels.optim.directions import FirstGradient
from tests.optim.family import MEMBERS, ONE_PASS
from tests.optim.family_runs import CASES, TWO_STEP_CASES, close, everything_of, make, run, using, what_a_skipped_step_leaves
from tests.optim.problem import assert_same_bits, every_backend, loss_of, make_batch, make_model, twin, weights
from tests.optim.scaler_flows import SCALE, InfOnPass

OPTIONS: dict[str, Any] = {"lambd": 0.6}  # a mix with USAM: a scale that is forgotten anywhere shows


def scaler_of(scale: float = SCALE) -> Any:
    return torch.amp.GradScaler("cpu", init_scale=scale)


def step_with(optimizer: Any, model: nn.Module, scaler: Any, batch: Any, bad_pass: int | None = None) -> None:
    spoil = InfOnPass(bad_pass)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        scaler.scale(spoil(loss)).backward()
        return loss

    optimizer.step(closure, grad_scaler=scaler)
    scaler.update()


def two_steps_with(flow: str, optimizer: Any, model: nn.Module, scaler: Any, batch: Any) -> None:
    def backward() -> Tensor:
        loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        return loss

    optimizer.zero_grad()
    if optimizer.direction.first_gradient is FirstGradient.ELSEWHERE:
        optimizer.random_step()
    if optimizer.direction.first_gradient is not FirstGradient.NONE:
        backward()
    unscales = flow == "unscale_" and optimizer.direction.first_gradient is not FirstGradient.NONE
    if unscales:
        scaler.unscale_(optimizer)
    optimizer.first_step(zero_grad=True, grad_scaler=None if unscales else scaler)
    loss = backward()
    given = {"loss": loss} if isinstance(optimizer, sam_kernels.SAMSPS) else {}
    if flow == "unscale_":
        scaler.unscale_(optimizer.base_optimizer)
        optimizer.second_step(**given)
    elif flow == "scaler.step":
        scaler.step(optimizer)
    else:
        optimizer.second_step(grad_scaler=scaler, **given)
    scaler.update()


@every_backend
@pytest.mark.parametrize(("name", "base"), CASES)
def test_a_scaled_run_is_the_unscaled_one(backend: str, name: str, base: str) -> None:
    model = make_model(torch.float64)
    other = twin(model)
    with using(backend):
        scaled, plain = make(name, model.parameters(), base, **OPTIONS), make(name, other.parameters(), base, **OPTIONS)
        scaler = scaler_of()
        for k in range(5):
            step_with(scaled, model, scaler, make_batch(torch.float64, seed=k))
            run(plain, other, 1, start=k)
    assert scaled.skipped_steps == 0
    close(everything_of(scaled, model), everything_of(plain, other))


@every_backend
@pytest.mark.parametrize("flow", ["unscale_", "second_step", "scaler.step"])
@pytest.mark.parametrize(("name", "base"), TWO_STEP_CASES)
def test_two_scaled_steps_are_the_unscaled_ones(backend: str, name: str, base: str, flow: str) -> None:
    if name == "SAMSPS" and flow == "scaler.step":
        pytest.skip("scaler.step cannot hand over the loss: see the next test")
    model = make_model(torch.float64)
    other = twin(model)
    with using(backend):
        scaled, plain = make(name, model.parameters(), base, **OPTIONS), make(name, other.parameters(), base, **OPTIONS)
        scaler = scaler_of()
        for k in range(4):
            two_steps_with(flow, scaled, model, scaler, make_batch(torch.float64, seed=k))
            run(plain, other, 1, start=k)
    assert scaled.skipped_steps == 0
    close(everything_of(scaled, model), everything_of(plain, other))


def test_scaler_step_of_sam_sps_names_what_is_missing() -> None:
    model = make_model()
    optimizer = make("SAMSPS", model.parameters())
    with pytest.raises(RuntimeError, match=r"give second_step\(loss=\.\.\.\)"):
        two_steps_with("scaler.step", optimizer, model, scaler_of(), make_batch())


@pytest.mark.parametrize("scaled", ["first", "second", "first, and then unscaled by scaler.step"])
@pytest.mark.parametrize("name", ["SAM", "GSAM", "WSAM-coupled", "WSAM-decoupled"])
def test_a_scale_in_one_pass_alone_is_refused_where_the_step_is_made_of_both(name: str, scaled: str) -> None:
    model, batch = make_model(torch.float64), make_batch(torch.float64)
    optimizer, scaler = make(name, model.parameters()), scaler_of()

    def backward() -> None:
        scaler.scale(loss_of(model, batch)).backward()

    def second_step() -> None:
        if scaled == "second":
            optimizer.second_step(grad_scaler=scaler)
        elif scaled == "first":
            optimizer.second_step()
        else:
            scaler.step(optimizer)

    backward()
    if scaled == "second":
        scaler.unscale_(optimizer)
    optimizer.first_step(zero_grad=True, grad_scaler=None if scaled == "second" else scaler)
    backward()
    if scaled != "second":
        scaler.unscale_(optimizer)
    moved = weights(model)
    if name == "SAM":
        second_step()
        assert optimizer.skipped_steps == 0
        assert not torch.equal(weights(model)[0], moved[0])
        return
    with pytest.raises(RuntimeError, match=r"SAM: the (first|second) pass was given a loss scale, the (first|second) one was not"):
        second_step()
    assert_same_bits(weights(model), moved)


@every_backend
@pytest.mark.parametrize("bad_pass", [1, 2])
@pytest.mark.parametrize(("name", "base"), CASES)
def test_an_overflow_skips_and_halves(backend: str, name: str, base: str, bad_pass: int) -> None:
    model = make_model()
    with using(backend):
        optimizer = make(name, model.parameters(), base, **({"k": 1} if name == "LookSAM" else {}))
        scaler = scaler_of()
        step_with(optimizer, model, scaler, make_batch())
        before = everything_of(optimizer, model)[: len(list(model.parameters())) + len(optimizer.state)]
        step_with(optimizer, model, scaler, make_batch(), 1 if name in ONE_PASS else bad_pass)
        assert_same_bits(everything_of(optimizer, model)[: len(before)], before)
        assert optimizer.skipped_steps == 1
        assert scaler.get_scale() == SCALE / 2
        step_with(optimizer, model, scaler, make_batch())
    assert optimizer.skipped_steps == 1
    assert all(each.isfinite().all() for each in everything_of(optimizer, model))


@pytest.mark.parametrize("name", list(MEMBERS))
def test_an_overflow_in_a_step_of_one_pass_skips_and_halves(name: str) -> None:
    model = make_model()
    optimizer = make(name, model.parameters(), rho=schedules.Interval(0.05, every=5))
    scaler = scaler_of()
    step_with(optimizer, model, scaler, make_batch())
    before = what_a_skipped_step_leaves(name, optimizer, model)
    step_with(optimizer, model, scaler, make_batch(), 1)
    assert_same_bits(what_a_skipped_step_leaves(name, optimizer, model), before)
    assert (optimizer.skipped_steps, scaler.get_scale()) == (1, SCALE / 2)


@pytest.mark.parametrize("max_grad_norm", [0.05, 100.0])
@pytest.mark.parametrize("name", ["SAM", "VaSSO", "GCSAM", "GSAM", "WSAM-coupled", "LookSAM", "RSAM"])
def test_clipping_sees_the_norm_without_the_scale(name: str, max_grad_norm: float) -> None:
    model = make_model(torch.float64)
    other = twin(model)
    scaled, plain = (make(name, net.parameters(), "adamw", max_grad_norm=max_grad_norm) for net in (model, other))
    scaler = scaler_of()
    for k in range(3):
        step_with(scaled, model, scaler, make_batch(torch.float64, seed=k))
        run(plain, other, 1, start=k)
    close(everything_of(scaled, model), everything_of(plain, other))
