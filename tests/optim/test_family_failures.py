"""Gradients that are not finite, closures that raise: every member is left as it was, and goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels import schedules
from tests.optim.family import MEMBERS, ONE_PASS
from tests.optim.family_runs import CASES, everything_of, make, memory_of, run, state_of, two_steps, using, what_a_skipped_step_leaves
from tests.optim.problem import BACKENDS, assert_same_bits, closure_of, every_backend, loss_of, make_batch, make_model, weights

pytestmark = pytest.mark.engine


def spoiled(optimizer: Any, model: nn.Module, bad_pass: int, spoil: Callable[[], None]) -> Callable[[], Tensor]:
    """A closure whose call number ``bad_pass`` ends with ``spoil``."""
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        loss = closure_of(optimizer, model, make_batch())()
        if len(calls) == bad_pass:
            spoil()
        return loss

    return closure


def passes_of(name: str) -> list[int]:
    return [1] if name in ONE_PASS else [1, 2]


FAILURES = [
    pytest.param(*case.values, bad_pass, id=f"{case.id}-pass{bad_pass}") for case in CASES for bad_pass in passes_of(case.values[0])
]


@every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "base", "bad_pass"), FAILURES)
def test_a_gradient_that_is_not_finite_skips_the_step(backend: str, name: str, base: str, bad_pass: int, bad: float) -> None:
    model = make_model()

    def spoil() -> None:
        model[2].bias.grad[1] = bad  # type: ignore[index, union-attr]

    with using(backend):
        optimizer = make(name, model.parameters(), base, **({"k": 1} if name == "LookSAM" else {}))
        run(optimizer, model, 2)
        before, state = weights(model), state_of(optimizer)
        optimizer.step(spoiled(optimizer, model, bad_pass, spoil))
        assert_same_bits(weights(model), before)
        assert_same_bits(state_of(optimizer), state)
        assert optimizer.skipped_steps == 1
        assert all(each.isfinite().all() for each in memory_of(optimizer))
        run(optimizer, model, 3)
    assert optimizer.skipped_steps == 1
    assert all(each.isfinite().all() for each in everything_of(optimizer, model))
    assert all(not torch.equal(after, early) for after, early in zip(weights(model), before, strict=True))


@every_backend
@pytest.mark.parametrize("bad_pass", [1, 2])
@pytest.mark.parametrize("name", ["VaSSO", "FriendlySAM", "LookSAM", "MomentumSAM", "S2SAM", "SAMSPS"])
def test_the_first_step_of_all_may_be_a_skipped_one(backend: str, name: str, bad_pass: int) -> None:
    """What begins there begins finite."""
    model = make_model()

    def spoil() -> None:
        model[0].weight.grad.fill_(float("nan"))  # type: ignore[union-attr]

    with using(backend):
        optimizer = make(name, model.parameters())
        before = weights(model)
        optimizer.step(spoiled(optimizer, model, bad_pass if len(passes_of(name)) == 2 else 1, spoil))
        assert optimizer.skipped_steps == 1
        assert_same_bits(weights(model), before)
        run(optimizer, model, 4)
    assert optimizer.skipped_steps == 1
    assert all(each.isfinite().all() for each in everything_of(optimizer, model))


@every_backend
@pytest.mark.parametrize("name", list(MEMBERS))
def test_steps_with_one_pass_are_skipped_too(backend: str, name: str) -> None:
    """Twice, so that neither is taken for the other, and a step in between that must be made."""
    model = make_model()

    def spoil() -> None:
        model[0].bias.grad[0] = float("inf")  # type: ignore[index, union-attr]

    with using(backend):
        optimizer = make(name, model.parameters(), rho=schedules.Interval(0.05, every=7))
        run(optimizer, model, 1)
        for skipped in (1, 2):
            before, state = what_a_skipped_step_leaves(name, optimizer, model), state_of(optimizer)
            optimizer.step(spoiled(optimizer, model, 1, spoil))
            assert_same_bits(what_a_skipped_step_leaves(name, optimizer, model), before)
            assert_same_bits(state_of(optimizer), state)
            assert optimizer.skipped_steps == skipped
            run(optimizer, model, 1)
            assert optimizer.skipped_steps == skipped
            assert not torch.equal(weights(model)[0], before[0])


@every_backend
@pytest.mark.parametrize("rho", [0.0, 0.1])
@pytest.mark.parametrize("as_number", [False, True])
@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_a_polyak_step_of_a_loss_that_is_not_finite_is_skipped(
    backend: str, rho: float, as_number: bool, loss: float, momentum: float
) -> None:
    """Its gradients may well be finite: a logarithm that overflowed and was cut off."""
    model = make_model()
    with using(backend):
        optimizer = make("SAMSPS", model.parameters(), rho=rho, momentum=momentum)
        run(optimizer, model, 1)
        before, state = weights(model), state_of(optimizer)

        def closure() -> Any:
            closure_of(optimizer, model, make_batch())()
            return loss if as_number else torch.tensor(loss)

        optimizer.step(closure)
        assert_same_bits(weights(model), before)
        assert_same_bits(state_of(optimizer), state)
        assert optimizer.skipped_steps == 1


@every_backend
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["RuntimeError", "KeyboardInterrupt"])
@pytest.mark.parametrize(("name", "base", "bad_pass"), FAILURES)
def test_a_closure_that_raises_leaves_the_weights(backend: str, name: str, base: str, bad_pass: int, error: BaseException) -> None:
    model = make_model()
    seen: list[list[Tensor]] = []

    def spoil() -> None:
        seen.append(weights(model))
        raise error

    with using(backend):
        optimizer = make(name, model.parameters(), base, **({"k": 1} if name == "LookSAM" else {}))
        run(optimizer, model, 2)
        before, state = weights(model), state_of(optimizer)
        with pytest.raises(type(error)):
            optimizer.step(spoiled(optimizer, model, bad_pass, spoil))
        moved = bad_pass == 2 or name in ("RSAM", *ONE_PASS)
        assert torch.equal(seen[0][0], before[0]) is not moved
        assert_same_bits(weights(model), before)
        assert_same_bits(state_of(optimizer), state)
        with pytest.raises(RuntimeError, match="call first_step first"):
            optimizer.second_step()
        run(optimizer, model, 2)
    assert optimizer.skipped_steps == 0
    assert not torch.equal(weights(model)[0], before[0])
    assert all(each.isfinite().all() for each in everything_of(optimizer, model))


@pytest.mark.parametrize("name", [name for name in MEMBERS if name not in ("VaSSO", "FriendlySAM", "RSAM", "LookSAM")])
def test_after_a_closure_that_raised_the_step_is_the_one_it_would_have_been(name: str) -> None:
    """For members that keep nothing of the pass before (averages have it, random numbers and intervals count the step)."""
    model, other = make_model(), make_model()
    optimizer, expected = make(name, model.parameters()), make(name, other.parameters())

    def spoil() -> None:
        raise RuntimeError("no")

    run(optimizer, model, 1)
    run(expected, other, 1)
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step(spoiled(optimizer, model, passes_of(name)[-1], spoil))
    run(optimizer, model, 2, start=1)
    run(expected, other, 2, start=1)
    assert_same_bits(everything_of(optimizer, model), everything_of(expected, other))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("when", ["random_step", "first_step"])
def test_an_iteration_of_rsam_given_up_is_undone_by_the_next(backend: str, when: str) -> None:
    model = make_model()
    with using(backend):
        optimizer = make("RSAM", model.parameters())
        two_steps(optimizer, model, make_batch())
        before = weights(model)
        optimizer.zero_grad()
        optimizer.random_step()
        assert not torch.equal(weights(model)[0], before[0])
        loss_of(model, make_batch()).backward()
        if when == "first_step":
            optimizer.first_step()
        optimizer._restore()
        assert_same_bits(weights(model), before)
        optimizer.random_step()
        loss_of(model, make_batch()).backward()
        if when == "first_step":
            optimizer.first_step()
        seen: list[list[Tensor]] = []
        optimizer.random_step()  # from where the weights were
        optimizer._restore()
        seen.append(weights(model))
    assert_same_bits(seen[0], before)


def test_buffers_that_were_changed_between_steps_survive_an_error_in_the_first_pass() -> None:
    """RSAM has moved the weights by then, so that there is something to take back: not last step's statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = sam_kernels.RSAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    optimizer.step(closure_of(optimizer, model, make_batch()))
    model[1].running_mean.fill_(7.0)

    def closure() -> Tensor:
        raise RuntimeError("before any forward pass")

    with pytest.raises(RuntimeError, match="before any"):
        optimizer.step(closure)
    assert (model[1].running_mean == 7.0).all()


@every_backend
@pytest.mark.parametrize("name", ["GSAM", "WSAM-coupled", "WSAM-decoupled", "LookSAM"])
def test_a_kept_gradient_of_a_group_without_an_ascent_is_looked_at_too(backend: str, name: str) -> None:
    """No norm of the ascent has seen it, and the step is made of it."""
    model = make_model()

    def spoil() -> None:
        model[2].bias.grad[1] = float("nan")  # type: ignore[index, union-attr]

    with using(backend):
        optimizer = make(name, [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "rho": 0.0}])
        before = weights(model)
        optimizer.step(spoiled(optimizer, model, 1, spoil))
    assert_same_bits(weights(model), before)
    assert optimizer.skipped_steps == 1


@every_backend
def test_weights_that_overflow_in_a_step_that_was_made_do_not_make_it_a_skipped_one(backend: str) -> None:
    weight = nn.Parameter(torch.ones(4))
    with using(backend):
        optimizer = sam_kernels.WSAM([weight], torch.optim.SGD, lr=3e38, rho=0.1)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    assert not weight.isfinite().any()
    assert optimizer.skipped_steps == 0
