"""The two-step API takes the very steps of ``step(closure)``, whoever holds the gradients and however they are zeroed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels.optim import descents, directions
from sam_kernels.schedules import Tail
from tests.optim.family import CLOSURES_ONLY, MEMBERS, ONE_PASS
from tests.optim.family_runs import ONE_CASE_EACH, TWO_STEP_CASES, everything_of, make, run, two_steps, using
from tests.optim.problem import assert_same_bits, closure_of, every_backend, loss_of, make_batch, make_model, twin, weights

KEEP_GRADS = ["GSAM", "WSAM-coupled", "WSAM-decoupled", "LookSAM"]


@every_backend
@pytest.mark.parametrize(("zero_first", "zero_second"), [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize(("name", "base"), TWO_STEP_CASES)
def test_two_steps_are_a_step_bit_for_bit(backend: str, name: str, base: str, zero_first: bool, zero_second: bool) -> None:
    model = make_model()
    other = twin(model)
    with using(backend):
        two, one = make(name, model.parameters(), base, rho=lambda t: 0.1 / t), make(name, other.parameters(), base, rho=lambda t: 0.1 / t)
        for k in range(4):
            two_steps(two, model, make_batch(seed=k), zero_first=zero_first, zero_second=zero_second)
            assert all((param.grad is None) is zero_second for param in model.parameters())
            run(one, other, 1, start=k)
    assert two.param_groups[0]["sam_step"] == 4
    assert_same_bits(everything_of(two, model), everything_of(one, other))


@pytest.mark.parametrize("name", CLOSURES_ONLY)
def test_a_member_says_that_it_needs_closures(name: str) -> None:
    model = make_model()
    optimizer = make(name, model.parameters())
    loss_of(model, make_batch()).backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match=rf"SAM\.first_step: {name} needs step\(closure\): not every step has two passes"):
        optimizer.first_step()
    assert_same_bits(weights(model), before)
    assert optimizer.param_groups[0]["sam_step"] == 0


@pytest.mark.parametrize("name", list(MEMBERS))
def test_second_step_needs_a_first(name: str) -> None:
    model = make_model()
    optimizer = make(name, model.parameters())
    loss_of(model, make_batch()).backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"SAM\.second_step: call first_step first"):
        optimizer.second_step()
    assert_same_bits(weights(model), before)


def test_rsam_is_told_which_step_is_missing() -> None:
    model = make_model()
    optimizer = make("RSAM", model.parameters())
    loss_of(model, make_batch()).backward()
    with pytest.raises(RuntimeError, match=r"RSAM needs random_step\(\) before the first forward pass, or step\(closure\)"):
        optimizer.first_step()
    optimizer.random_step()
    with pytest.raises(RuntimeError, match="call first_step first"):
        optimizer.second_step()
    with pytest.raises(RuntimeError, match="call first_step after random_step"):
        optimizer.step()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"random_step\(\) before"):
        optimizer.first_step()
    optimizer.second_step()


@pytest.mark.parametrize("name", [name for name in MEMBERS if name != "RSAM"])
def test_random_step_is_for_directions_that_begin_elsewhere(name: str) -> None:
    optimizer = make(name, make_model().parameters())
    with pytest.raises(RuntimeError, match=r"SAM\.random_step: direction '\w+' begins at the weights; call first_step"):
        optimizer.random_step()
    assert optimizer.param_groups[0]["sam_step"] == 0


def test_random_step_called_again_is_the_same_step() -> None:
    model, batch = make_model(), make_batch()
    other = twin(model)
    optimizer, expected = make("RSAM", model.parameters()), make("RSAM", other.parameters())
    for _ in range(2):
        optimizer.random_step()
        two_steps(optimizer, model, batch)
        two_steps(expected, other, batch)
    assert optimizer.param_groups[0]["sam_step"] == 2
    assert_same_bits(everything_of(optimizer, model), everything_of(expected, other))


@every_backend
@pytest.mark.parametrize(("name", "base"), TWO_STEP_CASES)
def test_two_steps_where_nothing_ascends_are_a_step_where_nothing_does(backend: str, name: str, base: str) -> None:
    model = make_model()
    other, radius = twin(model), Tail(0.1, start=2)
    with using(backend):
        two, one = make(name, model.parameters(), base, rho=radius), make(name, other.parameters(), base, rho=radius)
        for k in range(4):
            two_steps(two, model, make_batch(seed=k))
            run(one, other, 1, start=k)
            assert_same_bits(everything_of(two, model), everything_of(one, other))


def test_sam_sps_without_a_loss_or_a_first_step_is_refused() -> None:
    """It would be SGD with gamma_b for its lr. (With lr = 0 torch.distributed.checkpoint makes its state.)"""
    model = make_model()
    optimizer = make("SAMSPS", model.parameters())
    closure_of(optimizer, model, make_batch())()
    before = weights(model)
    with pytest.raises(RuntimeError, match="the loss at the perturbed point is needed"):
        optimizer.step()
    assert_same_bits(everything_of(optimizer, model), before)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert_same_bits(weights(model), before)


def test_sam_sps_asks_for_the_loss_before_anything_is_touched() -> None:
    """Running statistics are those of the second pass until then, and hooks have seen no step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer, seen = sam_kernels.SAMSPS(model.parameters(), model=model), []
    optimizer.register_step_pre_hook(lambda *_: seen.append(1))
    loss_of(model, make_batch()).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, make_batch()).backward()
    before = [value.clone() for value in model.state_dict().values()]
    with pytest.raises(RuntimeError, match="the loss at the perturbed point is needed"):
        optimizer.second_step()
    assert_same_bits(list(model.state_dict().values()), before)
    assert not seen


def test_sam_sps_without_a_loss_says_so_and_can_go_on() -> None:
    model, batch = make_model(), make_batch()
    other = twin(model)
    optimizer, expected = make("SAMSPS", model.parameters()), make("SAMSPS", other.parameters())
    loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    loss = loss_of(model, batch)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"SAMSPS: the loss at the perturbed point is needed: .* second_step\(loss=\.\.\.\)"):
        optimizer.second_step()
    with pytest.raises(TypeError, match=r"SAMSPS: the loss must be a number or a tensor of one element, got 'low'"):
        optimizer.second_step(loss="low")
    optimizer.second_step(loss=loss)
    two_steps(expected, other, batch)
    assert_same_bits(everything_of(optimizer, model), everything_of(expected, other))
    start = weights(model)
    with pytest.raises(RuntimeError, match="return it from the closure"):
        optimizer.step(lambda: closure_of(optimizer, model, batch)() and None)
    assert_same_bits(weights(model), start)


def test_a_loss_of_a_step_that_failed_is_not_taken_for_this_ones() -> None:
    model, batch = make_model(), make_batch()
    optimizer = make("SAMSPS", model.parameters())
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return closure_of(optimizer, model, batch)()

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    closure_of(optimizer, model, batch)()
    optimizer.first_step()
    closure_of(optimizer, model, batch)()
    with pytest.raises(RuntimeError, match="the loss at the perturbed point is needed"):
        optimizer.step()


@pytest.mark.parametrize("name", ONE_PASS)
def test_no_random_state_is_needed_before_an_only_pass(name: str) -> None:
    model = make_model()
    optimizer = make(name, model.parameters(), preserve_rng_state=True)
    for _ in range(2):
        two_steps(optimizer, model, make_batch())
    assert optimizer.param_groups[0]["sam_step"] == 2


@every_backend
@pytest.mark.parametrize("how", ["set to zero", "flat buffer", "held elsewhere", "accumulated by hand"])
@pytest.mark.parametrize("name", KEEP_GRADS)
def test_kept_gradients_are_not_overwritten_by_the_second_pass(backend: str, name: str, how: str) -> None:
    """Whoever else writes there: ``zero_grad(set_to_none=False)``, a flat buffer as DistributedDataParallel has, or the caller."""
    model, batch = make_model(), make_batch()
    other = twin(model)
    flat = torch.zeros(sum(param.numel() for param in model.parameters()))
    held: list[Any] = []
    with using(backend):
        optimizer, expected = make(name, model.parameters()), make(name, other.parameters())

        def closure() -> Tensor:
            if how in ("set to zero", "accumulated by hand"):
                optimizer.zero_grad(set_to_none=False)
            else:
                optimizer.zero_grad()
            if how == "flat buffer":
                flat.zero_()
                params = list(model.parameters())
                views = flat.split([param.numel() for param in params])
                for param, view in zip(params, views, strict=True):
                    param.grad = view.view_as(param)
            loss = loss_of(model, batch)
            if how == "accumulated by hand":
                for param, grad in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                    param.grad = grad if param.grad is None else param.grad.copy_(grad)
            else:
                loss.backward()
            if how == "held elsewhere":
                held.extend(param.grad for param in model.parameters())
            return loss

        for _ in range(5):
            optimizer.step(closure)
            run(expected, other, 1, start=5)
    if how == "flat buffer":  # views at any offset: inner products add up in another order where packs of 16 bytes do not fit
        for got, wanted in zip(everything_of(optimizer, model), everything_of(expected, other), strict=True):
            # Five steps, each with a coefficient, two products and a sum that may be rounded otherwise; nothing is larger than 1.
            torch.testing.assert_close(got, wanted, rtol=0, atol=5 * 4 * 2.0**-24)
        return
    assert_same_bits(everything_of(optimizer, model), everything_of(expected, other))


@pytest.mark.parametrize("name", [name for name in KEEP_GRADS if name != "LookSAM"])
def test_kept_gradients_survive_zeroing_by_hand_in_two_steps(name: str) -> None:
    model, other = make_model(), make_model()
    optimizer, expected = make(name, model.parameters()), make(name, other.parameters())
    for k in range(3):
        batch = make_batch(seed=k)
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, batch).backward()
        optimizer.first_step()
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, batch).backward()
        optimizer.second_step()
        two_steps(expected, other, batch)
    assert_same_bits(everything_of(optimizer, model), everything_of(expected, other))


@pytest.mark.parametrize(("name", "base"), ONE_CASE_EACH)
def test_the_bases_own_step_is_no_way_around_the_rule(name: str, base: str) -> None:
    """``scaler.step(optimizer.base_optimizer)`` is SAM's second step; a rule that rewrites the gradients would be left out."""
    if name in (*CLOSURES_ONLY, "RSAM", *ONE_PASS):
        pytest.skip("no such first_step, or another test's")
    model, batch = make_model(), make_batch()
    optimizer = make(name, model.parameters(), base)
    loss_of(model, batch).backward()
    start = weights(model)
    optimizer.first_step(zero_grad=True)
    loss = loss_of(model, batch)
    loss.backward()
    if not optimizer.descent.rewrites and name != "GCSAM":
        optimizer.base_optimizer.step()
        assert not optimizer._passes.is_perturbed
        return
    moved = weights(model)
    with pytest.raises(RuntimeError, match=r"without the rule of '[\w-]+'; call second_step\(\)"):
        optimizer.base_optimizer.step()
    assert_same_bits(weights(model), moved)
    optimizer.second_step(**({"loss": loss} if name == "SAMSPS" else {}))
    assert not torch.equal(weights(model)[0], start[0])


@pytest.mark.parametrize("api", ["closure", "two-step"])
def test_a_direction_that_moves_first_works_without_its_own_class(api: str) -> None:
    model, other = make_model(), make_model()
    direction = directions.Randomized(0.05, 0.8, 7)
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, direction=direction, descent=descents.Plain())
    expected = sam_kernels.RSAM(other.parameters(), torch.optim.SGD, lr=0.1, sigma=0.05, c=0.8, seed=7)
    if api == "closure":
        run(optimizer, model, 3)
    else:
        for k in range(3):
            two_steps(optimizer, model, make_batch(seed=k))
    run(expected, other, 3)
    assert_same_bits(weights(model), weights(other))


def test_frozen_parameters_with_old_gradients_stay_out_of_rsams_first_move() -> None:
    """They are not trained; torch's optimizers step along a gradient that is there all the same."""
    frozen, moving = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(4))
    frozen.grad = torch.zeros(3)
    groups = [{"params": [frozen]}, {"params": [moving]}]
    optimizer = sam_kernels.RSAM(groups, torch.optim.SGD, lr=0.1, sigma=0.1)
    seen = []

    def closure() -> Tensor:
        moving.grad = None
        seen.append(frozen.detach().clone())
        loss = moving.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(seen[0], torch.ones(3))
    assert torch.equal(frozen.detach(), torch.ones(3))
    assert not torch.equal(moving.detach(), torch.ones(4))
