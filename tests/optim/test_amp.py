"""Row 5: an unmodified ``torch.amp.GradScaler``, on the CPU."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import sam_kernels
from tests.optim.problem import assert_same_bits, closure_of, loss_of, make_batch, make_model, twin, weights
from tests.optim.scaler_flows import BASES, FLOWS, SCALE, InfOnPass, scaled_closure, step_with


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("lambd", [1.0, 0.3])
@pytest.mark.parametrize(("base", "kwargs"), BASES)
def test_row_05_scaled_training_is_unscaled_training(flow: str, lambd: float, base: Any, kwargs: dict[str, Any]) -> None:
    model = make_model(torch.float64)
    model = model.float()
    other = twin(model)
    scaled = sam_kernels.SAM(model.parameters(), base, lambd=lambd, **kwargs)
    plain = sam_kernels.SAM(other.parameters(), base, lambd=lambd, **kwargs)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            step_with(flow, scaled, model, scaler)
            step_with("closure", plain, other, torch.amp.GradScaler("cpu", enabled=False))
    # A power of two scales without rounding; what is left is the norm's last bit.
    for got, expected in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-7)
    assert scaler.get_scale() == SCALE
    assert scaled.skipped_steps == 0


# scaler.step sees the second pass only; that the step is skipped all the same is the next test.
@pytest.mark.parametrize(("flow", "bad_pass"), [(flow, bad) for flow in FLOWS for bad in (1, 2) if (flow, bad) != ("scaler.step", 1)])
@pytest.mark.parametrize(("base", "kwargs"), BASES)
def test_row_05_inf_in_either_pass_skips_the_whole_step(flow: str, bad_pass: int, base: Any, kwargs: dict[str, Any]) -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), base, **kwargs)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    step_with(flow, optimizer, model, scaler)
    before, state = weights(model), [value.clone() for s in optimizer.state.values() for value in s.values() if isinstance(value, Tensor)]
    step_with(flow, optimizer, model, scaler, bad_pass)
    assert_same_bits(weights(model), before)
    assert_same_bits([value for s in optimizer.state.values() for value in s.values() if isinstance(value, Tensor)], state)
    assert optimizer.skipped_steps == 1
    assert scaler.get_scale() == SCALE / 2
    step_with(flow, optimizer, model, scaler)
    assert optimizer.skipped_steps == 1
    assert all(not torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


@pytest.mark.parametrize(("base", "kwargs"), BASES)
def test_row_05_inf_in_the_first_pass_skips_under_scaler_step(base: Any, kwargs: dict[str, Any]) -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), base, **kwargs)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    before = weights(model)
    step_with("scaler.step", optimizer, model, scaler, bad_pass=1)
    assert_same_bits(weights(model), before)
    assert optimizer.skipped_steps == 1


def test_row_05_a_closure_through_the_scaler_is_refused() -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(torch.zeros(()))  # as in any iteration but the first: the scaler has its scale
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"grad_scaler=scaler"):
        scaler.step(optimizer, scaled_closure(optimizer, model, scaler, InfOnPass(None)))
    assert_same_bits(weights(model), before)


def test_row_05_a_plain_step_through_the_scaler_is_unscaled() -> None:
    model = make_model()
    other = twin(model)
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(loss_of(model, make_batch())).backward()
    scaler.step(optimizer)
    scaler.update()
    loss_of(other, make_batch()).backward()
    plain.step()
    assert_same_bits(weights(model), weights(other))


def test_row_05_pass_two_through_the_base_optimizer() -> None:
    """``scaler.step(optimizer.base_optimizer)``: the base never steps from perturbed weights."""
    model = make_model()
    other = twin(model)
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    expected = sam_kernels.SAM(other.parameters(), torch.optim.SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(loss_of(model, make_batch())).backward()
    scaler.unscale_(optimizer)
    optimizer.first_step(zero_grad=True)
    scaler.scale(loss_of(model, make_batch())).backward()
    scaler.step(optimizer.base_optimizer)
    scaler.update()
    step_with("closure", expected, other, torch.amp.GradScaler("cpu", enabled=False))
    for got, want in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-7)


def test_row_05_a_disabled_scaler_changes_nothing() -> None:
    model = make_model()
    other = twin(model)
    with_scaler = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    without = sam_kernels.SAM(other.parameters(), torch.optim.SGD, lr=0.1)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    for flow in FLOWS:
        step_with(flow, with_scaler, model, disabled)
        step_with("closure", without, other, disabled)
    assert_same_bits(weights(model), weights(other))


def test_a_wrong_scaler_is_an_error() -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match=r"grad_scaler must be a torch\.amp\.GradScaler"):
        optimizer.step(lambda: None, grad_scaler=1024.0)
    with pytest.raises(RuntimeError, match=r"has not called grad_scaler\.scale"):
        optimizer.step(closure_of(optimizer, model, make_batch()), grad_scaler=torch.amp.GradScaler("cpu"))
