"""A loop of ``loss.backward(); optimizer.step()``: it trains with the base alone, and must be told so."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from sam_kernels import schedules
from tests.optim.problem import add_gradient, assert_same_bits, closure_of, make_batch, make_model, weights
from tests.optim.test_loops import sam


def plain_loop(optimizer: Any, model: nn.Module, steps: int) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad()
            add_gradient(model)
            optimizer.step()
    return [each for each in said if issubclass(each.category, UserWarning)]


def test_a_first_step_that_is_plain_is_warned_of() -> None:
    """A run of one step says so too."""
    model = make_model()
    (warning,) = plain_loop(sam(model), model, 1)
    for name in ("a first step without an ascent", "step(closure)", "SAMTrainer", "Accelerator", "SAMCallback"):
        assert name in str(warning.message)


def test_a_first_step_after_a_checkpoint_is_none() -> None:
    model = make_model()
    optimizer, other = sam(model), sam(model)
    optimizer.step(closure_of(optimizer, model, make_batch()))
    other.load_state_dict(optimizer.state_dict())
    assert not plain_loop(other, model, 1)
    (warning,) = plain_loop(other, model, 2)
    assert "two steps" in str(warning.message)


def test_plain_steps_are_warned_of_once_for_each_optimizer() -> None:
    for _ in range(2):
        model = make_model()
        (warning,) = plain_loop(sam(model), model, 5)
        for name in ("step(closure)", "first_step", "backward"):
            assert name in str(warning.message)


@pytest.mark.parametrize("scheduler", [False, True])
def test_the_warning_points_at_the_line_of_the_loop(scheduler: bool) -> None:
    model = make_model()
    optimizer = sam(model)
    if scheduler:
        torch.optim.lr_scheduler.ConstantLR(optimizer)  # which wraps step
    (warning,) = plain_loop(optimizer, model, 2)
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "options",
    [
        {"rho": 0.0},
        {"rho": lambda t: 0.0},
        {"rho": schedules.Tail(0.1, start=100)},
        {"rho": schedules.Interval(0.1, every=2, start=100)},
        {"lr": 0.0},
        {"lr": torch.tensor(0.0)},
    ],
    ids=["zero", "callable", "tail", "interval", "lr", "lr-tensor"],
)
def test_plain_steps_that_are_meant_are_not_warned_of(options: dict[str, Any]) -> None:
    model = make_model()
    assert not plain_loop(sam(model, **options), model, 4)


@pytest.mark.parametrize("between", ["closure", "two steps", "backward"])
def test_plain_steps_between_those_of_sam_are_not_warned_of(between: str) -> None:
    model = make_model()
    optimizer = sam(model)
    for i in range(4):
        assert i == 0 or not plain_loop(optimizer, model, 1)
        optimizer.zero_grad()
        if between == "closure":
            optimizer.step(closure_of(optimizer, model, make_batch()))
        elif between == "two steps":
            add_gradient(model)
            optimizer.first_step(zero_grad=True)
            add_gradient(model)
            optimizer.second_step()
        else:
            optimizer.backward(partial(add_gradient, model))
            optimizer.step()


def test_a_warning_made_an_error_comes_before_the_weights_move() -> None:
    model = make_model()
    optimizer = sam(model)
    add_gradient(model)
    before = weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="a first step without an ascent"):
            optimizer.step()
    assert_same_bits(weights(model), before)
