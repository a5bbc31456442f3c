"""Loops that were written for another optimizer: what is refused, warned of, or right as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import RWSAM, SAM
from tests.optim.family_runs import close, make
from tests.optim.problem import add_gradient, assert_same_bits, closure_of, loss_of, make_batch, make_model, twin, weights
from tests.optim.rwsam_problem import losses_of

ADDS = "the closure added its gradient to one that was in .grad before"
COMPUTES_NOTHING = "the closure left no gradient of its own"


def sam(model: nn.Module, **options: Any) -> Any:
    return make("SAM", model.parameters(), **options)


# --- gradients from before the closure ---


def refused(optimizer: Any, model: nn.Module, words: str, *args: Any, **kwargs: Any) -> None:
    """The step raises and has done nothing."""
    before, state = weights(model), optimizer.state_dict()
    with pytest.raises(RuntimeError, match=words):
        optimizer.step(*args, **kwargs)
    assert_same_bits(weights(model), before)
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]  # t too
    assert after["state"].keys() == state["state"].keys()
    for key, entries in state["state"].items():
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(after["state"][key][name]), torch.as_tensor(value)), (key, name)
    assert not hooks_of(model)


def hooks_of(model: nn.Module) -> list[Any]:
    kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return [hook for param in model.parameters() for kind in kinds for hook in (getattr(param, kind) or {}).values()]


def refused_calls(optimizer: Any, model: nn.Module) -> dict[str, Callable[[str], None]]:
    one = partial(add_gradient, model)
    good = closure_of(optimizer, model, make_batch())
    return {
        "one": lambda words: refused(optimizer, model, words, one),
        "micro-batches": lambda words: refused(optimizer, model, words, [one, one]),
        "second micro-batch": lambda words: refused(optimizer, model, words, [good, one]),
        "ascent": lambda words: refused(optimizer, model, words, good, ascent_closure=one),
        "descent": lambda words: refused(optimizer, model, words, one, ascent_closure=good),
    }


@pytest.mark.parametrize("how", ["one", "micro-batches", "second micro-batch", "ascent", "descent"])
def test_a_closure_that_adds_to_older_gradients_is_refused(how: str) -> None:
    model = make_model()
    optimizer = sam(model)
    optimizer.step(closure_of(optimizer, model, make_batch()))
    refused_calls(optimizer, model)[how](ADDS)


@pytest.mark.parametrize(
    ("name", "base"), [("MomentumSAM", "sgd-momentum"), ("S2SAM", "rmsprop"), ("RSAM", "adamw"), ("GSAM", "adam"), ("VaSSO", "rmsprop")]
)
def test_members_refuse_it_too(name: str, base: str) -> None:
    model = make_model()
    optimizer = make(name, model.parameters(), base)
    optimizer.step(closure_of(optimizer, model, make_batch()))
    if name == "VaSSO":
        # Its average may have moved.
        with pytest.raises(RuntimeError, match=ADDS):
            optimizer.step(partial(add_gradient, model))
        return
    refused(optimizer, model, ADDS, partial(add_gradient, model))


def test_accumulation_around_the_closure_is_refused_at_the_first_step() -> None:
    model = make_model()
    optimizer = sam(model)
    add_gradient(model)
    refused(optimizer, model, ADDS, partial(add_gradient, model))


def test_micro_batches_that_are_not_zeroed_are_refused_where_the_radius_rests() -> None:
    model = make_model()
    optimizer = sam(model, rho=0.0)
    add_gradient(model)
    refused(optimizer, model, ADDS, [partial(add_gradient, model)] * 2)


def test_with_rho_zero_gradients_accumulate_around_a_closure_as_with_the_base() -> None:
    model = make_model()
    other = twin(model)
    optimizer, base = sam(model, rho=0.0), torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1)
    add_gradient(model)
    optimizer.step(partial(add_gradient, model))
    add_gradient(other)
    add_gradient(other)
    base.step()
    assert_same_bits(weights(model), weights(other))


@pytest.mark.parametrize("how", ["one", "micro-batches", "ascent"])
def test_a_closure_without_backward_is_refused(how: str) -> None:
    model = make_model()
    optimizer = sam(model)

    def forward_only() -> Tensor:
        return loss_of(model, make_batch())

    calls = {"one": (forward_only,), "micro-batches": ([forward_only] * 2,), "ascent": (closure_of(optimizer, model, make_batch()),)}
    for has_old in (False, True):
        if has_old:
            add_gradient(model)
        refused(optimizer, model, COMPUTES_NOTHING, *calls[how], **({"ascent_closure": forward_only} if how == "ascent" else {}))
        optimizer.zero_grad()


def test_a_refused_step_may_be_made_again_and_is_step_one() -> None:
    model = make_model()
    other, radii = twin(model), []
    optimizer = sam(model, rho=lambda t: radii.append(t) or 0.1 / t)
    radii.clear()
    add_gradient(model)
    refused(optimizer, model, ADDS, partial(add_gradient, model))
    optimizer.step(closure_of(optimizer, model, make_batch()))
    expected = sam(other, rho=0.1)
    expected.step(closure_of(expected, other, make_batch()))
    assert_same_bits(weights(model), weights(other))
    assert radii == [1]


def test_a_closure_that_runs_out_of_memory_leaves_t_where_it_was() -> None:
    model = make_model()
    optimizer, calls = sam(model), []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return closure_of(optimizer, model, make_batch())()

    with pytest.raises(MemoryError):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["sam_step"] == 0


# --- all the ways to zero, and to set ---


def zero_all(how: str, optimizer: Any, model: nn.Module) -> None:
    if how.startswith("model"):
        model.zero_grad(set_to_none=how.endswith("none"))
    elif how.startswith("optimizer"):
        optimizer.zero_grad(set_to_none=how.endswith("none"))
    for param in model.parameters():
        if how == "none":
            param.grad = None
        elif param.grad is not None:
            if how == "zero_":
                param.grad.zero_()
            elif how == "data.zero_":
                param.grad.data.zero_()
            elif how == "mul_":
                param.grad *= 0


ZEROED = ["model-none", "model-zero", "optimizer-none", "optimizer-zero", "none", "zero_", "data.zero_", "mul_"]


def backward_in(how: str, loss: Tensor, params: list[Tensor], kept: list[Tensor | None]) -> None:
    """The gradient into ``.grad``, by some other way than by accumulating it."""
    if how == "create_graph":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for param in params:
                param.grad = None
            loss.backward(create_graph=True)
        return
    grads = torch.autograd.grad(loss, params)
    for param, grad, old in zip(params, grads, kept, strict=True):
        if how == "new" or param.grad is None:
            param.grad = grad.clone()
        elif how == "same object":
            param.grad.detach().copy_(grad)
            param.grad = old if old is not None else param.grad
        elif how == "copy_":
            param.grad.copy_(grad)
        else:
            param.grad.data.copy_(grad)


def sam_steps(zero: Callable[[Any, nn.Module], None], backward: Callable[[Tensor, nn.Module, Any], None]) -> tuple[nn.Module, Any]:
    model = make_model()
    optimizer = sam(model)

    def closure() -> Tensor:
        zero(optimizer, model)
        loss = loss_of(model, make_batch())
        backward(loss, model, optimizer)
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return model, optimizer


def as_usual() -> nn.Module:
    return sam_steps(lambda optimizer, _: optimizer.zero_grad(), lambda loss, *_: loss.backward())[0]


@pytest.mark.parametrize("how", ZEROED)
def test_every_way_to_zero_is_one(how: str) -> None:
    model, _ = sam_steps(partial(zero_all, how), lambda loss, *_: loss.backward())
    close(weights(model), weights(as_usual()), rtol=1e-6, atol=1e-7)
    assert not hooks_of(model)


@pytest.mark.parametrize("how", ["new", "same object", "copy_", "data.copy_", "create_graph"])
def test_gradients_set_by_hand_need_no_zeroing(how: str) -> None:
    kept: list[Tensor | None] = [None] * 4

    def backward(loss: Tensor, model: nn.Module, _: Any) -> None:
        params = list(model.parameters())
        backward_in(how, loss, params, kept)
        kept[:] = [param.grad for param in params]

    model, _ = sam_steps(lambda *_: None, backward)
    close(weights(model), weights(as_usual()), rtol=1e-6, atol=1e-7)
    assert not hooks_of(model)


def test_gradients_written_without_autograd_are_gradients() -> None:
    """Through ``.data`` no version counts, and no hook runs."""
    param = nn.Parameter(torch.tensor([1.0, 2.0]))
    param.grad = torch.ones(2)
    optimizer = SAM([param], torch.optim.SGD, lr=0.1, rho=0.5)

    def closure() -> None:
        assert param.grad is not None
        param.grad.data.copy_(param.detach() ** 3)

    optimizer.step(closure)
    start = torch.tensor([1.0, 2.0])
    right = start - 0.1 * (start + 0.5 * start**3 / (start**3).norm()) ** 3
    torch.testing.assert_close(param.detach(), right)


def test_micro_batches_inside_of_a_closure_accumulate() -> None:
    model = make_model()
    optimizer, (inputs, targets) = sam(model), make_batch()

    def closure() -> float:
        optimizer.zero_grad(set_to_none=False)
        total = 0.0
        for piece in zip(inputs.split(4), targets.split(4), strict=True):
            loss = loss_of(model, piece) / 4
            loss.backward()
            total += loss.item()
        return total

    for _ in range(3):
        optimizer.step(closure)
    close(weights(model), weights(as_usual()), rtol=1e-5, atol=1e-6)


def test_gradients_that_are_views_of_one_buffer_stay_it() -> None:
    model = make_model()
    params = list(model.parameters())
    flat = torch.zeros(sum(param.numel() for param in params))
    views = [view.view_as(param) for view, param in zip(flat.split([param.numel() for param in params]), params, strict=True)]
    for param, view in zip(params, views, strict=True):
        param.grad = view
    optimizer = sam(model)

    def closure() -> Tensor:
        flat.zero_()
        return add_gradient(model)

    for _ in range(3):
        optimizer.step(closure)
        assert all(param.grad is view for param, view in zip(params, views, strict=True))
    close(weights(model), weights(as_usual()), rtol=1e-6, atol=1e-7)
    refused(optimizer, model, ADDS, partial(add_gradient, model))
    assert all(param.grad is view for param, view in zip(params, views, strict=True))


def test_parameters_that_only_some_closures_reach() -> None:
    torch.manual_seed(0)
    parts = nn.ModuleList([nn.Linear(6, 2) for _ in range(3)])
    optimizer = sam(parts)
    for step in range(6):
        used = parts[step % 3]

        def closure(used: nn.Module = used) -> Tensor:
            optimizer.zero_grad(set_to_none=False)
            return add_gradient(used)

        optimizer.step(closure)
    assert optimizer.skipped_steps == 0
    assert not hooks_of(parts)


def test_a_dead_parameter_with_zero_gradient_is_no_accumulation() -> None:
    """As the first factor of LoRA is, whose gradient is 0 at the beginning."""
    torch.manual_seed(0)
    first, second = nn.Linear(6, 4, bias=False), nn.Linear(4, 2, bias=False)
    nn.init.zeros_(second.weight)
    model = nn.Sequential(first, second)
    optimizer = sam(model)

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        add_gradient(model)
        return add_gradient(model)

    optimizer.step(closure)
    optimizer.backward(partial(add_gradient, model))
    optimizer.step()


def test_closures_of_rwsam_need_not_zero_and_leave_no_hooks() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, lr=0.1)
    inputs, labels = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 3, (6,))
    for _ in range(2):
        losses_of(model, (inputs, labels)).mean().backward()
        optimizer.step([partial(losses_of, model, (inputs[:3], labels[:3])), partial(losses_of, model, (inputs[3:], labels[3:]))])
        optimizer.step(partial(losses_of, model, (inputs, labels)))
    assert optimizer.skipped_steps == 0
    assert not hooks_of(model)


def test_an_exception_in_the_closure_leaves_the_gradients_that_were_there() -> None:
    model = make_model()
    optimizer = sam(model)
    add_gradient(model)
    grads = [param.grad for param in model.parameters()]

    def closure() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert all(param.grad is grad for param, grad in zip(model.parameters(), grads, strict=True))
    assert not hooks_of(model)


# --- the two-step API ---


def two_halves(optimizer: Any, model: nn.Module, **first: bool) -> None:
    optimizer.zero_grad()
    loss_of(model, make_batch()).backward()
    optimizer.first_step(**first)
    loss_of(model, make_batch()).backward()
    optimizer.second_step()


def test_a_second_pass_that_adds_to_the_first_is_warned_of_once() -> None:
    model = make_model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            two_halves(optimizer, model)
    assert ["sum of gradients of two points; call first_step(zero_grad=True)" in str(each.message) for each in caught] == [True]
    assert not any(param._backward_hooks or param._post_accumulate_grad_hooks for param in model.parameters())


def test_zeroed_halves_are_not_warned_of() -> None:
    model = make_model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two_halves(optimizer, model, zero_grad=True)
        loss_of(model, make_batch()).backward()
        optimizer.first_step()
        model.zero_grad(set_to_none=False)
        loss_of(model, make_batch()).backward()
        optimizer.second_step()
