"""S²-SAM's direction, the gradients of the step before: taken over where nobody else has them, copied where somebody does."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels import S2SAM, schedules
from sam_kernels.optim import directions
from sam_kernels.optim._engine import last_grads
from tests.optim.family import MEMBERS
from tests.optim.family_runs import close, everything_of, make, memory_of, run, two_steps, using
from tests.optim.problem import (
    add_gradient,
    assert_same_bits,
    closure_of,
    every_backend,
    gradients,
    loss_of,
    make_batch,
    make_model,
    through_a_file,
    twin,
    weights,
)

pytestmark = pytest.mark.engine


def kept(optimizer: Any, model: nn.Module) -> list[Tensor | None]:
    found: list[Tensor | None] = optimizer._memory.entries("last_grad", list(model.parameters()))
    return found


def places(tensors: list[Any]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def watched(optimizer: Any, model: nn.Module, seed: int, see: Callable[[list[Tensor]], None]) -> Callable[[], Tensor]:
    """A closure that shows its gradients before it returns."""

    def closure() -> Tensor:
        loss = closure_of(optimizer, model, make_batch(next(model.parameters()).dtype, seed=seed))()
        see([param.grad for param in model.parameters() if param.grad is not None])
        return loss

    return closure


@every_backend
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("base", ["sgd-momentum", "adamw"])
def test_gradients_are_taken_over_without_a_copy(backend: str, base: str, groups: int) -> None:
    """Those that autograd made are kept where they lie, and those of the step before are gone."""
    model = make_model()
    params = list(model.parameters())
    with using(backend):
        optimizer = make("S2SAM", params if groups == 1 else [{"params": params[:2]}, {"params": params[2:]}], base)
        for k in range(3):
            seen: list[int] = []
            old = [weakref.ref(each) for each in kept(optimizer, model) if each is not None]
            optimizer.step(watched(optimizer, model, k, lambda grads, seen=seen: seen.extend(places(grads))))
            assert all(each() is None for each in old)  # before they are looked up by parameter again
            assert places(kept(optimizer, model)) == seen
            assert all(param.grad is None for param in params)


COPIED: dict[str, dict[str, Any]] = {
    "a base that is not fused": {"base": "rmsprop"},
    "capturable": {"capturable": True},
    "a plain step": {"rho": schedules.Tail(0.1, start=100)},
}


@every_backend
@pytest.mark.parametrize("case", [*COPIED, "two steps", "held elsewhere", "backward"])
def test_gradients_that_stay_somebodys_are_copied_once(backend: str, case: str) -> None:
    """``.grad`` is the caller's then, who may write it; later copies lie where the first ones do."""
    model = make_model()
    with using(backend):
        optimizer = make("S2SAM", model.parameters(), **COPIED.get(case, {}))
        first: list[int] = []
        for k in range(3):
            seen: list[Tensor] = []
            if case == "two steps":
                two_steps(optimizer, model, make_batch(seed=k), zero_second=False)
                seen = [param.grad for param in model.parameters() if param.grad is not None]
            elif case == "backward":
                optimizer.zero_grad()
                optimizer.backward(partial(add_gradient, model, make_batch(seed=k)))
                optimizer.step()
                seen = [param.grad for param in model.parameters() if param.grad is not None]
            else:
                held = seen if case == "held elsewhere" else []
                optimizer.step(watched(optimizer, model, k, lambda grads, held=held: held.extend(grads)))
                seen = seen or [param.grad for param in model.parameters() if param.grad is not None]
            found = kept(optimizer, model)
            assert_same_bits(found, seen)  # type: ignore[arg-type]
            first = first or places(found)
            assert places(found) == first
            assert not set(first) & set(places(seen))
            before = [each.clone() for each in found if each is not None]
            optimizer.zero_grad(set_to_none=False)
            assert_same_bits(kept(optimizer, model), before)  # type: ignore[arg-type]


@every_backend
@pytest.mark.parametrize("base", ["sgd-momentum", "rmsprop"])
def test_what_is_kept_is_neither_clipped_nor_scaled(backend: str, base: str) -> None:
    model = make_model(torch.float64)
    scaler = torch.amp.GradScaler("cpu", init_scale=3.0 * 2**10)
    with using(backend):
        optimizer = make("S2SAM", model.parameters(), base, max_grad_norm=1e-3)
        for k in range(2):
            seen: list[Tensor] = []

            def closure(k: int = k, seen: list[Tensor] = seen) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, make_batch(torch.float64, seed=k))
                seen.extend(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))
                scaler.scale(loss).backward()
                return loss

            optimizer.step(closure, grad_scaler=scaler)
            close(kept(optimizer, model), seen, rtol=1e-14)  # type: ignore[arg-type]


def spoiled(optimizer: Any, model: nn.Module) -> Callable[[], Tensor]:
    def spoil(grads: list[Tensor]) -> None:
        grads[0].view(-1)[1] = float("nan")

    return watched(optimizer, model, 7, spoil)


@every_backend
@pytest.mark.parametrize("base", ["sgd-momentum", "rmsprop"])
def test_the_step_after_a_skipped_one_is_made_as_the_first_is(backend: str, base: str) -> None:
    """Without an ascent, and with what the base has kept; saved and copied in between, nothing is kept."""
    model = make_model(torch.float64)
    with using(backend):
        optimizer = make("S2SAM", model.parameters(), base)
        run(optimizer, model, 2)
        optimizer.step(spoiled(optimizer, model))
        assert optimizer.skipped_steps == 1
        assert memory_of(optimizer) == []
        others = [twin(model) for _ in range(2)]
        resumed = make("S2SAM", others[0].parameters(), base)
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        plain = make("S2SAM", others[1].parameters(), base, rho=lambda t: 0.0 if t == 4 else MEMBERS["S2SAM"].rho)
        saved = through_a_file(optimizer.state_dict())
        saved["param_groups"][0]["rho"] = None  # the function stays
        plain.load_state_dict(saved)
        copied = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
        runs = [(model, optimizer), (others[1], plain), (others[0], resumed), *copied]
        for net, each in runs:
            run(each, net, 3)
        close(everything_of(plain, others[1]), everything_of(optimizer, model))  # step 4 is the base's own, which rounds in another order
        for net, each in runs[2:]:
            assert_same_bits(everything_of(each, net), everything_of(optimizer, model))


@every_backend
def test_two_calls_of_backward_are_one_with_their_sum(backend: str) -> None:
    model = make_model(torch.float64)
    other = twin(model)
    with using(backend):
        optimizer, expected = make("S2SAM", model.parameters()), make("S2SAM", other.parameters())
        for k in range(3):
            batch = make_batch(torch.float64, seed=k)
            for half in zip(*(part.chunk(2) for part in batch), strict=True):
                optimizer.backward(partial(add_gradient, model, half, 0.5))
            optimizer.step()
            optimizer.zero_grad()
            expected.step(closure_of(expected, other, batch))
            close(everything_of(optimizer, model), everything_of(expected, other))


@every_backend
def test_a_rule_that_rewrites_the_gradients_leaves_the_direction_what_they_were(backend: str) -> None:
    """With momentum the Polyak step is written into ``.grad``."""
    model = make_model()
    with using(backend):
        optimizer = sam_kernels.SAMSPS(model.parameters(), momentum=0.6, direction=directions.Stale())
        for k in range(3):
            seen: list[Tensor] = []
            optimizer.step(watched(optimizer, model, k, lambda grads, seen=seen: seen.extend(grad.clone() for grad in grads)))
            assert_same_bits(kept(optimizer, model), seen)  # type: ignore[arg-type]
            assert not torch.equal(model[0].weight.grad, seen[0])  # type: ignore[union-attr, arg-type]


def test_a_group_whose_radius_is_the_number_zero_keeps_nothing() -> None:
    model = make_model()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "rho": 0.0}]
    optimizer = make("S2SAM", groups)
    run(optimizer, model, 2)
    assert [each is None for each in kept(optimizer, model)] == [False, False, True, True]
    optimizer.param_groups[1]["rho"] = 0.1
    run(optimizer, model, 2)
    assert None not in kept(optimizer, model)


def test_a_parameter_without_a_gradient_has_nothing_kept() -> None:
    model = make_model()
    optimizer = make("S2SAM", model.parameters())
    run(optimizer, model, 2)
    model[0].bias.requires_grad_(False)
    run(optimizer, model, 1)
    assert [each is None for each in kept(optimizer, model)] == [False, True, False, False]


@pytest.mark.parametrize("phases", [schedules.Interval(0.1, every=3), schedules.Tail(0.1, start=3)], ids=["interval", "tail"])
def test_the_direction_is_one_step_old_after_steps_that_rest(phases: Any) -> None:
    """Every forward pass of steps 1 to 8 is at w, or at w + ρ g / ‖g‖ with g the gradient of the step before, whatever that was."""
    model = make_model(torch.float64)
    optimizer = S2SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=phases)
    last: list[Tensor] = []
    for t in range(1, 9):
        start, seen = weights(model), []

        def closure(seen: list[Any] = seen, t: int = t) -> Tensor:
            seen.append((weights(model), gradients(model, make_batch(torch.float64, seed=t))))
            return loss_of(model, make_batch(torch.float64, seed=t))

        optimizer.step(closure)
        ((point, now),) = seen
        norm = sum((each.square().sum() for each in last), torch.zeros(())).sqrt()
        ascends = phases.takes_part(t) and t > 1
        close(point, [w + 0.1 * g / norm for w, g in zip(start, last, strict=True)] if ascends else start)
        last = now


def test_the_bases_own_second_half_is_refused_which_would_keep_nothing() -> None:
    model = make_model()
    optimizer = make("S2SAM", model.parameters())
    run(optimizer, model, 1)
    optimizer.first_step()
    moved = weights(model)
    loss_of(model, make_batch()).backward()
    with pytest.raises(RuntimeError, match=r"would not keep the gradients, along which direction 'stale' .*; call second_step\(\)"):
        optimizer.base_optimizer.step()
    assert_same_bits(weights(model), moved)
    optimizer.second_step()


def test_a_graph_needs_something_kept_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    optimizer = make("S2SAM", model.parameters(), capturable=True)
    monkeypatch.setattr(last_grads, "is_recording", lambda device: True)
    before = weights(model)
    with pytest.raises(RuntimeError, match="no gradient of an earlier step is kept in this place; make an eager step"):
        run(optimizer, model, 1)
    assert_same_bits(weights(model), before)
    monkeypatch.undo()
    run(optimizer, model, 1)
    spoiled_flag = optimizer._memory.spoiled
    monkeypatch.setattr(last_grads, "is_recording", lambda device: True)
    run(optimizer, model, 2)
    assert optimizer._memory.spoiled is spoiled_flag  # where a graph reads it


def test_a_direction_of_ones_own_must_name_what_is_kept() -> None:
    class Nameless(directions.Direction):
        keeps_last_grads = True

    with pytest.raises(TypeError, match=r"Nameless\.keeps_last_grads is set, but its keeps names nothing"):
        sam_kernels.SAM(make_model().parameters(), torch.optim.SGD, lr=0.1, direction=Nameless())
