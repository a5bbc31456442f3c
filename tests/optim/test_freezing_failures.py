"""``freeze_unperturbed=True``: what an exception leaves behind, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import GSAM, RWSAM, SAM, WSAM, LookSAM, MomentumSAM, norm_layers
from sam_kernels.optim import descents, directions
from sam_kernels.schedules import Interval
from tests.optim.family_runs import everything_of
from tests.optim.frozen_problem import Noting, loss_and_backward, make_frozen, make_model, moving, resting
from tests.optim.problem import assert_same_bits, closure_of, loss_of, make_batch, twin, weights

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
ERRORS = [KeyboardInterrupt(), GeneratorExit(), RuntimeError("of the closure"), torch.OutOfMemoryError("of the device")]


def halves(optimizer: Any, closure: Callable[[], Tensor]) -> None:
    with optimizer.ascent():
        closure()
    optimizer.first_step(zero_grad=True)
    closure()
    optimizer.second_step(zero_grad=True)


@pytest.mark.parametrize("way", ["step", "backward", "halves"])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_exception_restores_what_requires_a_gradient(error: BaseException, at: int, early: bool, way: str) -> None:
    model = make_model()
    other = twin(model)
    optimizer, plain = make_frozen("SAM", model), make_frozen("SAM", other, freeze=False)
    optimizer.step(closure_of(optimizer, model, make_batch()))
    plain.step(closure_of(plain, other, make_batch()))
    optimizer.zero_grad()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    grads = [param.grad for param in resting(model)]
    before = everything_of(optimizer, model)
    zero: Callable[[Any], None] | None = (lambda _: None) if way == "backward" else None
    closure = Noting(optimizer, model, zero=zero, error=error, at=at, early=early)
    step = {"step": optimizer.step, "backward": optimizer.backward, "halves": partial(halves, optimizer)}[way]
    with pytest.raises(type(error)) as caught:
        step(closure)
    assert caught.value is error
    assert all(param.requires_grad for param in model.parameters())
    if at == 0:
        assert all(param.grad is grad for param, grad in zip(resting(model), grads, strict=True))
    if way != "halves" or at == 0:
        assert_same_bits(everything_of(optimizer, model), before)
    optimizer.step(closure_of(optimizer, model, make_batch()))  # restores the weights of an unfinished first_step
    plain.step(closure_of(plain, other, make_batch()))
    assert_same_bits(everything_of(optimizer, model), everything_of(plain, other))


def test_an_interrupt_while_parameters_are_being_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    optimizer, calls = make_frozen("SAM", model), []
    freeze = Tensor.requires_grad_

    def requires_grad_(param: Tensor, value: bool = True) -> Tensor:
        calls.append(value)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return freeze(param, value)

    before = weights(model)
    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "requires_grad_", requires_grad_)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure_of(optimizer, model, make_batch()))
    assert calls[:2] == [False, False]
    assert all(param.requires_grad for param in model.parameters())
    assert_same_bits(weights(model), before)


# --- a loss that reaches nothing ---


def only_the_last(model: nn.Sequential, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model[4](batch[0].repeat(1, 2)[:, :9]), batch[1])


@pytest.mark.parametrize("way", ["backward of a loss", "autograd.grad"])
def test_a_loss_that_depends_on_nothing_that_moves(way: str) -> None:
    model = make_model()
    optimizer, before = make_frozen("SAM", model), weights(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        if way == "autograd.grad":
            loss = loss_of(model, make_batch())
            torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        else:
            loss = only_the_last(model, make_batch())
            loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="does not depend on a trainable parameter of a group with rho > 0"):
        optimizer.step(closure)
    assert all(param.requires_grad for param in model.parameters())
    assert_same_bits(weights(model), before)


def test_rwsam_whose_losses_depend_on_nothing_that_moves() -> None:
    model = make_model()
    optimizer = RWSAM(model, torch.optim.SGD, beta=0.0, params=norm_layers(model), freeze_unperturbed=True, rho=0.1, **SGD)
    with pytest.raises(RuntimeError, match="does not depend on a trainable parameter of a group with rho > 0"):
        optimizer.step(lambda: only_the_last(model, make_batch()).repeat(3))


# --- what is refused ---


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(GSAM, rho=0.1), "descent 'gsam' steps along the gradients of the first pass too"),
        (WSAM, "descent 'wsam' steps along"),
        (partial(WSAM, decoupled=False), "descent 'wsam-coupled' steps along"),
        (LookSAM, "descent 'looksam' steps along"),
        (MomentumSAM, "direction 'momentum' takes no gradient before the ascent"),
    ],
)
def test_members_that_need_more_or_nothing_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"SAM: freeze_unperturbed=True: {words}"):
        make(norm_layers(make_model()), torch.optim.SGD, freeze_unperturbed=True, **SGD)


class Whole(directions.Direction):
    name = "whole"

    def refuses(self, use: directions.Use) -> bool:
        return use is directions.Use.FREEZING


class Own(descents.Descent):
    name = "own"

    def refuses(self, use: descents.Use) -> bool:
        return use is descents.Use.FREEZING


@pytest.mark.parametrize(("part", "name"), [({"direction": Whole()}, "direction 'whole'"), ({"descent": Own()}, "descent 'own'")])
def test_a_part_of_ones_own_may_refuse(part: dict[str, Any], name: str) -> None:
    SAM(norm_layers(make_model()), torch.optim.SGD, **part, **SGD)
    with pytest.raises(ValueError, match=f"freeze_unperturbed=True is not defined for {name}"):
        SAM(norm_layers(make_model()), torch.optim.SGD, freeze_unperturbed=True, **part, **SGD)


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_the_flag_is_a_flag(value: Any) -> None:
    with pytest.raises(TypeError, match="freeze_unperturbed"):
        SAM(norm_layers(make_model()), torch.optim.SGD, freeze_unperturbed=value, **SGD)


def of_model(model: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": model[0].parameters()}, {"params": model[1].parameters()}]


@pytest.mark.parametrize(
    ("rhos", "warns"),
    [
        ((0.1, 0.2), True),
        ((0.1, "0.1/k^0.5"), True),
        ((0.1, torch.tensor(0.2)), True),
        ((0.1, torch.tensor(0.0)), False),
        ((0.1, 0.0), False),
        ((0.1, Interval(0.1, every=2)), False),
        ((0.1, lambda t: 0.1), False),
        ((0.0, 0.0), False),  # the base's own steps
    ],
)
def test_nothing_to_freeze_is_told_once(rhos: tuple[Any, Any], warns: bool) -> None:
    groups = [{**group, "rho": rho} for group, rho in zip(of_model(make_model()), rhos, strict=True)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SAM(groups, torch.optim.SGD, freeze_unperturbed=True, **SGD)
    assert [str(each.message)[:55] for each in caught] == ["SAM: freeze_unperturbed=True has nothing to freeze: no "] * warns
    assert all(each.filename == __file__ for each in caught)


@pytest.mark.parametrize("rho", [0.1, Interval(0.1, every=2)])
def test_one_group_has_nothing_to_freeze(rho: Any) -> None:
    model = make_model()
    with pytest.warns(UserWarning, match="has nothing to freeze"):
        SAM(model.parameters(), torch.optim.SGD, rho=rho, freeze_unperturbed=True, **SGD)
    for param in resting(model):
        param.requires_grad_(False)
    groups = [{"params": moving(model)}, {"params": resting(model), "rho": 0.0}]
    with pytest.warns(UserWarning, match="has nothing to freeze"):  # all of it is frozen already
        SAM(groups, torch.optim.SGD, rho=rho, freeze_unperturbed=True, **SGD)


# --- the two-step API ---


def test_first_step_needs_ascent_around_the_first_pass() -> None:
    model = make_model()
    optimizer, before = make_frozen("SAM", model), weights(model)
    loss_and_backward(model)
    with pytest.raises(RuntimeError, match=r"under `with optimizer.ascent\(\):`"):
        optimizer.first_step()
    assert_same_bits(weights(model), before)
    optimizer.zero_grad()
    with optimizer.ascent():
        loss_and_backward(model)
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="ascent between first_step and second_step"), optimizer.ascent():
        pass
    loss_and_backward(model)
    optimizer.second_step(zero_grad=True)
    loss_and_backward(model)
    with pytest.raises(RuntimeError, match=r"under `with optimizer.ascent\(\):`"):  # each step anew
        optimizer.first_step()


def test_rho_may_not_change_what_rests_between_the_first_pass_and_first_step() -> None:
    model = make_model()
    optimizer = make_frozen("SAM", model)
    with optimizer.ascent():
        loss_and_backward(model)
    before = [group["rho"] for group in optimizer.param_groups]
    optimizer.param_groups[0]["rho"] = 0.2
    with pytest.raises(RuntimeError, match="with the rho that the groups have now"):
        optimizer.first_step()
    optimizer.param_groups[1]["rho"] = 0.0  # the other way round
    with pytest.raises(RuntimeError, match="with the rho that the groups have now"):
        optimizer.first_step()
    optimizer.param_groups[0]["rho"], optimizer.param_groups[1]["rho"] = before
    optimizer.first_step()


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_halves_with_nothing_to_freeze_need_no_context(rho: float) -> None:
    model = make_model()
    optimizer = SAM(of_model(model), torch.optim.SGD, rho=lambda t: rho, freeze_unperturbed=True, **SGD)
    for context in (nullcontext, optimizer.ascent):
        noting = Noting(optimizer, model)
        with context():
            noting()
        optimizer.first_step(zero_grad=True)
        noting()
        optimizer.second_step()
        assert noting.required == noting.had_grads == [[True] * 6] * 2


def test_without_the_option_ascent_changes_nothing() -> None:
    model = make_model()
    optimizer = make_frozen("SAM", model, freeze=False)
    noting = Noting(optimizer, model)
    with optimizer.ascent():
        noting()
    assert noting.required == noting.had_grads == [[True] * 6]
    optimizer.first_step()
