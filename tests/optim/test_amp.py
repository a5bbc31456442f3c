"""Row 5: an unmodified ``torch.amp.GradScaler``, on the CPU."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

import sam_kernels
from sam_kernels import functional
from sam_kernels.optim.descents import Descent, DescentStep, Outcome
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


def counted_checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements that each pass of ``check_finite_`` reads."""
    checks: list[int] = []
    real = functional.check_finite_

    def counting(grads: Any, found_inf: Tensor) -> None:
        checks.append(sum(grad.numel() for grad in grads))
        real(grads, found_inf)

    monkeypatch.setattr(functional, "check_finite_", counting)
    return checks


def second_half(optimizer: Any, model: Any, scaler: Any, between: Any = None) -> None:
    """After an ascent: the second pass, what the loop does to the gradients, and the scaler's step."""
    optimizer.zero_grad()
    scaler.scale(loss_of(model, make_batch())).backward()
    optimizer.first_step(zero_grad=True, grad_scaler=scaler)
    scaler.scale(loss_of(model, make_batch())).backward()
    if between is not None:
        between()
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("max_grad_norm", [None, float("inf")])
@pytest.mark.parametrize(("base", "kwargs"), BASES)
def test_gradients_that_the_scaler_has_just_looked_at_are_not_read_again(
    base: Any, kwargs: dict[str, Any], max_grad_norm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), base, max_grad_norm=max_grad_norm, **kwargs)
    everything = sum(param.numel() for param in model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    checks = counted_checks(monkeypatch)
    for flow, expected in (("scaler.step", []), ("closure", [everything]), ("two unscalings", [everything])):
        step_with(flow, optimizer, model, scaler)
        assert checks == expected, flow
        checks.clear()
    before = weights(model)
    step_with("scaler.step", optimizer, model, scaler, bad_pass=2)
    assert checks == []
    assert_same_bits(weights(model), before)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("written_by", ["after unscale_", "a hook", "a global hook", "a rule"])
def test_gradients_written_after_the_scaler_has_looked_are_read_again(written_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the loop after ``unscale_``, by a hook before the step, by the descent rule: NaN skips the step all the same."""
    model = make_model()
    spoiled: list[bool] = []

    def spoil(*_: Any) -> None:
        model[2].bias.grad[1] = float("nan")  # type: ignore[index, union-attr]

    class Spoiling(Descent):
        def rewrite(self, step: DescentStep) -> Outcome:
            if spoiled:
                spoil()
            return Outcome(is_checked=False)

    descent = Spoiling() if written_by == "a rule" else None
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, descent=descent)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    second_half(optimizer, model, scaler)
    before = weights(model)

    if written_by == "after unscale_":

        def unscale_and_spoil() -> None:
            scaler.unscale_(optimizer)
            spoil()

        second_half(optimizer, model, scaler, unscale_and_spoil)
    elif written_by == "a rule":
        spoiled.append(True)
        second_half(optimizer, model, scaler)
    else:
        register = optimizer.register_step_pre_hook if written_by == "a hook" else register_optimizer_step_pre_hook
        handle = register(spoil)
        second_half(optimizer, model, scaler)
        handle.remove()
    assert_same_bits(weights(model), before)
    assert optimizer.skipped_steps == 1
