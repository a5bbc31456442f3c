"""Steps that are not finite, and an unmodified ``torch.amp.GradScaler``, on the device. On the CPU: ``tests/optim/test_amp.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sam_kernels
from tests.helpers.compare import assert_same_bits
from tests.helpers.training import closure_of, everything, make
from tests.optim.problem import make_model, twin, weights
from tests.optim.scaler_flows import FLOWS, SCALE, step_with

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("kernels")]
BASES = [
    pytest.param(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, id="sgd-momentum"),
    pytest.param(torch.optim.AdamW, {"lr": 0.01, "fused": True}, id="adamw-fused"),
    pytest.param(torch.optim.AdamW, {"lr": 0.01}, id="adamw-counters-on-host"),
    pytest.param(torch.optim.RMSprop, {"lr": 0.01}, id="rmsprop-not-fused"),
]


def state_of(optimizer: Any) -> list[Tensor]:
    return [value.cpu().clone() for kept in optimizer.state.values() for value in kept.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_step_that_is_not_finite_is_skipped_and_counted(base: str, value: float, device: str) -> None:
    model, optimizer = make(base, device)
    closure = closure_of(optimizer, model)
    for expected in (0, 1, 1, 2):
        before = everything(model, optimizer)
        is_bad = expected > optimizer.skipped_steps
        model.factor.fill_(value if is_bad else 1.0)
        optimizer.step(closure)
        assert optimizer.skipped_steps == expected
        if is_bad:
            assert_same_bits("after a skipped step", everything(model, optimizer), before)
        else:
            assert not torch.equal(everything(model, optimizer)[0], before[0])


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("bad_pass", [1, 2])
def test_one_bad_pass_is_enough(base: str, bad_pass: int, device: str) -> None:
    model, optimizer = make(base, device)
    closure = closure_of(optimizer, model)
    for _ in range(2):
        optimizer.step(closure)
    before = everything(model, optimizer)
    for number, half in enumerate((optimizer.first_step, optimizer.second_step), 1):
        model.factor.fill_(torch.inf if number == bad_pass else 1.0)
        closure()
        half()
    assert_same_bits("after a skipped step", everything(model, optimizer), before)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("lambd", [1.0, 0.3])
@pytest.mark.parametrize(("base", "kwargs"), BASES)
def test_scaled_training_is_unscaled_training(flow: str, lambd: float, base: Any, kwargs: dict[str, Any], device: str) -> None:
    if device == "cpu" and kwargs.get("fused") and flow == "scaler.step":
        pytest.skip("a fused base on the CPU has no counters on a device")
    model = make_model().to(device)
    other = twin(model)
    scaled = sam_kernels.SAM(model.parameters(), base, lambd=lambd, **kwargs)
    plain = sam_kernels.SAM(other.parameters(), base, lambd=lambd, **kwargs)
    scaler = torch.amp.GradScaler(device, init_scale=SCALE)
    for _ in range(4):
        step_with(flow, scaled, model, scaler)
        step_with("closure", plain, other, torch.amp.GradScaler(device, enabled=False))
    # A power of two scales without rounding; what is left is the norm's last bit, and whatever a library's matmul does with it.
    for got, expected in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=5e-6, atol=2e-7)
    assert scaler.get_scale() == SCALE
    assert scaled.skipped_steps == 0


# scaler.step sees the second pass only: the step is skipped, the scale stays.
@pytest.mark.parametrize(("flow", "bad_pass"), [(flow, bad) for flow in FLOWS for bad in (1, 2)])
@pytest.mark.parametrize(("base", "kwargs"), BASES)
def test_inf_in_either_pass_skips_the_whole_step(flow: str, bad_pass: int, base: Any, kwargs: dict[str, Any], device: str) -> None:
    model = make_model().to(device)
    optimizer = sam_kernels.SAM(model.parameters(), base, **kwargs)
    scaler = torch.amp.GradScaler(device, init_scale=SCALE)
    step_with(flow, optimizer, model, scaler)
    before, state = weights(model), state_of(optimizer)
    step_with(flow, optimizer, model, scaler, bad_pass)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    assert_same_bits("state", state_of(optimizer), state)
    assert optimizer.skipped_steps == 1
    if (flow, bad_pass) != ("scaler.step", 1):
        assert scaler.get_scale() == SCALE / 2
