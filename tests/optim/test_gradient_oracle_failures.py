"""``optimizer.backward(closure)`` where something goes wrong: not finite, exceptions, calls in the wrong order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optim.family import ONE_PASS
from tests.optim.family_runs import close, make
from tests.optim.problem import add_gradient, assert_same_bits, closure_of, loss_of, make_batch, make_model, twin, weights
from tests.optim.test_gradient_oracle import grads_of, pairs

# --- not finite, exceptions ---


def spoiled(model: nn.Module, bad_call: int, do: Callable[[], None]) -> Callable[[], Tensor]:
    calls: list[int] = []

    def closure() -> Tensor:
        loss = add_gradient(model)
        calls.append(1)
        if len(calls) == bad_call:
            do()
        return loss

    return closure


@pytest.mark.parametrize("check_finite", [True, False])
@pytest.mark.parametrize(("name", "base"), [each for each in pairs() if each[0] not in ONE_PASS])
def test_an_ascent_that_is_not_finite_leaves_a_gradient_that_is_not(name: str, base: str, check_finite: bool) -> None:
    model = make_model()
    optimizer = make(name, model.parameters(), base, check_finite=check_finite)
    before = weights(model)
    optimizer.backward(spoiled(model, 1, lambda: model[2].bias.grad.fill_(float("nan"))))  # type: ignore[union-attr]
    assert not all(grad.isfinite().all() for grad in grads_of(model))
    optimizer.step()
    assert_same_bits(weights(model), before)
    assert optimizer.skipped_steps == 1
    optimizer.zero_grad()
    optimizer.backward(partial(add_gradient, model))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(not torch.equal(now, then) for now, then in zip(weights(model), before, strict=True))


@pytest.mark.parametrize("check_finite", [True, False])
@pytest.mark.parametrize("zero", ["optimizer", "model", "in place"])
def test_a_gradient_that_was_zeroed_in_the_place_of_a_step_skips_nothing(zero: str, check_finite: bool) -> None:
    model = make_model()
    other = twin(model)
    optimizer, expected = make("SAM", model.parameters(), check_finite=check_finite), make("SAM", other.parameters())
    optimizer.backward(spoiled(model, 1, lambda: model[2].bias.grad.fill_(float("nan"))))  # type: ignore[union-attr]
    if zero == "in place":
        model.zero_grad(set_to_none=False)
    else:
        {"optimizer": optimizer, "model": model}[zero].zero_grad()
    optimizer.backward(partial(add_gradient, model))
    optimizer.step()
    expected.backward(partial(add_gradient, other))
    expected.step()
    assert optimizer.skipped_steps == 0
    close(weights(model), weights(other), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("zero", ["optimizer", "optimizer in place", "model"])
def test_a_direction_that_keeps_an_average_may_begin_again_after_zeroing(zero: str) -> None:
    model = make_model()
    optimizer = make("VaSSO", model.parameters())
    optimizer.backward(partial(add_gradient, model))
    (model if zero == "model" else optimizer).zero_grad(set_to_none=not zero.endswith("in place"))
    optimizer.backward(partial(add_gradient, model))
    with pytest.raises(ValueError, match="call backward once for each step"):
        optimizer.backward(partial(add_gradient, model))


@pytest.mark.parametrize("bad_call", [1, 2])
@pytest.mark.parametrize(("name", "base"), [("SAM", "adamw"), ("RSAM", "adamw"), ("GSAM", "sgd-momentum"), ("GCSAM", "adamw")])
@pytest.mark.parametrize("has_outer", [False, True])
def test_an_exception_leaves_everything_as_it_was(name: str, base: str, bad_call: int, has_outer: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 2))
    optimizer = make(name, model.parameters(), base, model=model)
    if has_outer:
        optimizer.backward(partial(add_gradient, model))
    before, grads = weights(model), grads_of(model)
    bits = [None if grad is None else grad.clone() for grad in grads]

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.backward(spoiled(model, bad_call, fail))
    assert_same_bits(weights(model), before)
    for now, grad, bit in zip(grads_of(model), grads, bits, strict=True):
        assert now is grad
        assert grad is None or torch.equal(grad, bit)
    assert model[1].num_batches_tracked.item() == 1 + has_outer  # the pass that failed, as with any loop
    optimizer.backward(partial(add_gradient, model))
    optimizer.step()
    assert optimizer.param_groups[0]["sam_step"] == 1


def test_a_closure_without_a_gradient_is_refused() -> None:
    model = make_model()
    optimizer = make("SAM", model.parameters())
    add_gradient(model)
    grads = grads_of(model)
    with pytest.raises(RuntimeError, match=r"SAM\.backward: the closure left no gradient"):
        optimizer.backward(lambda: loss_of(model, make_batch()))
    assert all(now is then for now, then in zip(grads_of(model), grads, strict=True))


# --- what is refused ---


@pytest.mark.parametrize("name", ["LookSAM", "SAMSPS", "WSAM-decoupled"])
def test_a_step_that_is_more_than_a_gradient_is_refused(name: str) -> None:
    model = make_model()
    optimizer = make(name, model.parameters())
    with pytest.raises(ValueError, match=r"SAM\.backward: descent '[\w-]+' chooses more than a gradient; call step\(closure\)"):
        optimizer.backward(partial(add_gradient, model))
    assert all(grad is None for grad in grads_of(model))


@pytest.mark.parametrize("closure", [None, 1.0, []])
def test_a_closure_that_is_none_is_a_type_error(closure: Any) -> None:
    with pytest.raises(TypeError, match=r"SAM\.backward: closure must be a callable"):
        make("SAM", make_model().parameters()).backward(closure)


def test_between_the_two_steps_it_is_refused() -> None:
    model = make_model()
    optimizer = make("SAM", model.parameters())
    add_gradient(model)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="backward between first_step and second_step"):
        optimizer.backward(partial(add_gradient, model))


def test_first_step_after_it_is_refused_until_the_gradient_is_dropped() -> None:
    model = make_model()
    optimizer = make("SAM", model.parameters())
    optimizer.backward(partial(add_gradient, model))
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"SAM\.first_step: \.grad holds what backward\(closure\) has added"):
        optimizer.first_step()
    assert_same_bits(weights(model), before)
    optimizer.zero_grad()
    add_gradient(model)
    optimizer.first_step(zero_grad=True)
    add_gradient(model)
    optimizer.second_step()
    assert optimizer.param_groups[0]["sam_step"] == 1


def test_step_with_a_closure_after_it_drops_the_gradient() -> None:
    model = make_model()
    other = twin(model)
    optimizer, expected = make("SAM", model.parameters()), make("SAM", other.parameters())
    optimizer.backward(partial(add_gradient, model))
    with pytest.raises(RuntimeError, match="the closure added its gradient"):
        optimizer.step(partial(add_gradient, model))
    optimizer.step(closure_of(optimizer, model, make_batch()))
    expected.step(closure_of(expected, other, make_batch()))
    assert_same_bits(weights(model), weights(other))
