"""``freeze_unperturbed=True``: the steps are those without it, bit for bit, and the first pass computes what the ascent needs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from sam_kernels import SAM, norm_layers
from sam_kernels.schedules import Interval, Tail
from tests.optim.family_runs import everything_of, memory_of
from tests.optim.frozen_problem import Noting, loss_and_backward, make_frozen, make_model, moving, resting
from tests.optim.problem import assert_same_bits, closure_of, loss_of, make_batch, twin, weights
from tests.optim.scaler_flows import SCALE, InfOnPass, scaled_closure

MEMBERS = ["SAM", "VaSSO", "FriendlySAM", "Extragradient", "GCSAM", "RSAM", "SAMSPS"]
FIRST = [False, False, True, True, False, False]  # the parameters that require a gradient in the first pass
SECOND = [True] * 6


def by_closure(optimizer: Any, model: nn.Module, seed: int) -> None:
    optimizer.step(closure_of(optimizer, model, make_batch(seed=seed)))


def by_micro_batches(optimizer: Any, model: nn.Module, seed: int) -> None:
    optimizer.step(lambda *batch: closure_of(optimizer, model, batch)(), batch=make_batch(seed=seed), micro_batches=2)


def by_ascent_closure(optimizer: Any, model: nn.Module, seed: int) -> None:
    ascent = closure_of(optimizer, model, make_batch(seed=seed + 50))
    optimizer.step(closure_of(optimizer, model, make_batch(seed=seed)), ascent_closure=ascent)


def by_gradient(optimizer: Any, model: nn.Module, seed: int) -> None:
    for each in (seed, seed + 50) if not optimizer.direction.keeps else (seed,):
        optimizer.backward(partial(loss_and_backward, model, make_batch(seed=each)))
    optimizer.step()
    optimizer.zero_grad()


def by_halves(optimizer: Any, model: nn.Module, seed: int) -> None:
    batch = make_batch(seed=seed)
    if optimizer.direction.name == "randomized":
        optimizer.random_step()
    with optimizer.ascent():
        loss_and_backward(model, batch)
    optimizer.first_step(zero_grad=True)
    loss = loss_and_backward(model, batch)
    optimizer.second_step(zero_grad=True, loss=loss)


WAYS = {"closure": by_closure, "ascent closure": by_ascent_closure, "halves": by_halves}
MORE_WAYS = {"micro-batches": (by_micro_batches, ("VaSSO", "FriendlySAM", "SAMSPS")), "backward": (by_gradient, ("SAMSPS",))}
CASES: list[tuple[str, Callable[..., None]]] = [(name, way) for way in WAYS.values() for name in MEMBERS]
CASES += [(name, way) for way, without in MORE_WAYS.values() for name in MEMBERS if name not in without]


@pytest.mark.parametrize("options", [{}, {"adaptive": True, "eta": 0.1, "lambd": 0.5}], ids=["", "adaptive"])
@pytest.mark.parametrize("base", ["sgd-momentum", "adamw", "rmsprop"])
@pytest.mark.parametrize(("name", "way"), CASES)
def test_steps_have_the_same_bits(name: str, way: Callable[..., None], base: str, options: dict[str, Any]) -> None:
    model = make_model()
    other = twin(model)
    frozen, plain = make_frozen(name, model, base, **options), make_frozen(name, other, base, freeze=False, **options)
    before = weights(model)
    for seed in range(3):
        way(frozen, model, seed)
        way(plain, other, seed)
        assert_same_bits(everything_of(frozen, model), everything_of(plain, other))
    assert memory_of(frozen) or not frozen.direction.keeps
    assert all(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert frozen.skipped_steps == 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_first_pass_gives_resting_parameters_no_gradient(set_to_none: bool) -> None:
    model = make_model()
    optimizer = make_frozen("SAM", model, max_grad_norm=0.1)
    closure = Noting(optimizer, model, zero=lambda optimizer: optimizer.zero_grad(set_to_none=set_to_none))
    for _ in range(3):
        optimizer.step(closure)
    assert closure.required == [FIRST, SECOND] * 3
    assert closure.had_grads == [FIRST, SECOND] * 3


def test_the_halves_see_the_same() -> None:
    model = make_model()
    optimizer, noting = make_frozen("SAM", model), None
    for param in model.parameters():
        param.grad = torch.ones_like(param)  # of somebody else
    noting = Noting(optimizer, model)
    with optimizer.ascent():
        noting()
    assert [param.requires_grad for param in model.parameters()] == SECOND
    assert [param.grad is not None for param in model.parameters()] == FIRST
    optimizer.first_step()
    noting()
    optimizer.second_step()
    assert noting.required == noting.had_grads == [FIRST, SECOND]


def test_a_gradient_that_the_closure_assigns_is_dropped() -> None:
    """By hand, to a parameter that requires none: it is none of the first pass."""
    model = make_model()
    optimizer = make_frozen("SAM", model)
    with optimizer.ascent():
        loss_and_backward(model)
        for param in resting(model):
            param.grad = torch.full_like(param, torch.nan)
    assert [param.grad is not None for param in model.parameters()] == FIRST


def test_what_the_user_has_frozen_stays_frozen() -> None:
    model = make_model()
    groups = norm_layers(model)
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    before = weights(model)
    optimizer = SAM(groups, torch.optim.SGD, lr=0.1, rho=0.1, freeze_unperturbed=True)
    noting = Noting(optimizer, model)
    optimizer.step(noting)
    assert noting.required == [[False, False, True, False, False, False], [False, True, True, False, True, True]]
    assert [param.requires_grad for param in model.parameters()] == noting.required[1]
    assert [torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)] == [True, False, False, True, False, False]


def test_groups_take_turns() -> None:
    """Each step freezes what rests in it; one in which nothing ascends is the base's."""
    model = make_model()
    other = twin(model)

    def build(model: nn.Sequential, freeze: bool) -> Any:
        groups = [
            {"params": model[0].parameters(), "rho": Interval(0.1, every=4)},
            {"params": model[1].parameters(), "rho": Interval(0.1, every=2)},
            {"params": model[4].parameters(), "rho": Tail(0.1, start=5)},
        ]
        return SAM(groups, torch.optim.AdamW, lr=0.01, freeze_unperturbed=freeze)

    optimizer, plain = build(model, True), build(other, False)
    found = []
    for seed in range(6):
        noting = Noting(optimizer, model, make_batch(seed=seed))
        optimizer.step(noting)
        plain.step(closure_of(plain, other, make_batch(seed=seed)))
        found.append([row[::2] for row in noting.required])
        assert_same_bits(everything_of(optimizer, model), everything_of(plain, other))
    all_of_them = [True] * 3
    assert found == [
        [[True, True, False], all_of_them],
        [all_of_them],
        [[False, True, False], all_of_them],
        [all_of_them],
        [[True, True, False], all_of_them],
        [[False, False, True], all_of_them],
    ]


def test_both_passes_drop_the_same_elements() -> None:
    model = make_model(dropout=0.4)
    other = twin(model)
    optimizer, plain = (make_frozen("SAM", each, freeze=each is model, preserve_rng_state=True) for each in (model, other))
    for each, trained in ((optimizer, model), (plain, other)):
        torch.manual_seed(1)
        for _ in range(3):
            each.step(closure_of(each, trained, make_batch()))
    assert_same_bits(everything_of(optimizer, model), everything_of(plain, other))


@pytest.mark.parametrize("bad_pass", [None, 1, 2])
def test_a_scaler_skips_alike(bad_pass: int | None) -> None:
    model = make_model()
    other = twin(model)
    found = []
    for each, freeze in ((model, True), (other, False)):
        optimizer, scaler = make_frozen("SAM", each, freeze=freeze, lambd=0.5), torch.amp.GradScaler("cpu", init_scale=SCALE)
        spoil = InfOnPass(bad_pass)
        for _ in range(2):
            optimizer.step(scaled_closure(optimizer, each, scaler, spoil), grad_scaler=scaler)
            scaler.update()
        found.append((optimizer.skipped_steps, scaler.get_scale(), everything_of(optimizer, each)))
    assert found[0][:2] == found[1][:2]
    assert found[0][0] == (bad_pass is not None)
    assert_same_bits(found[0][2], found[1][2])


def test_gradients_of_earlier_calls_are_kept_by_backward() -> None:
    model = make_model()
    optimizer = make_frozen("SAM", model)
    optimizer.backward(partial(loss_and_backward, model))
    once = [param.grad.clone() for param in model.parameters()]  # type: ignore[union-attr]
    optimizer.backward(partial(loss_and_backward, model))
    for param, grad in zip(model.parameters(), once, strict=True):
        assert torch.equal(param.grad, 2 * grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))], ids=["copy", "pickle"])
def test_a_copy_freezes_too(how: Callable[[Any], Any]) -> None:
    model = make_model()
    model, optimizer = how((model, make_frozen("SAM", model)))
    noting = Noting(optimizer, model)
    optimizer.step(noting)
    assert noting.required == [FIRST, SECOND]


def test_a_copy_of_before_there_was_the_option_does_not() -> None:
    model = make_model()
    optimizer = make_frozen("SAM", model, freeze=False)
    state = optimizer.__getstate__()
    del state["freeze_unperturbed"]
    made = SAM.__new__(SAM)
    made.__setstate__(state)
    noting = Noting(made, model)
    made.step(noting)
    assert noting.required == [SECOND, SECOND]


def test_capturable_steps_have_the_same_bits() -> None:
    model = make_model()
    other = twin(model)
    optimizer, plain = (make_frozen("SAM", each, freeze=each is model, capturable=True) for each in (model, other))
    for way in (by_closure, by_halves, by_gradient):
        noting = Noting(optimizer, model)
        optimizer.step(noting)
        plain.step(closure_of(plain, other, make_batch()))
        assert noting.required == [FIRST, SECOND]
        way(optimizer, model, 1)
        way(plain, other, 1)
        assert_same_bits(everything_of(optimizer, model), everything_of(plain, other))


def test_only_moving_parameters_are_backed_up() -> None:
    model = make_model()
    optimizer = make_frozen("SAM", model)
    optimizer.step(closure_of(optimizer, model, make_batch()))
    backed_up = list(optimizer._passes.lists.backups._copies)
    assert {id(each) for each in backed_up} == {id(param) for param in moving(model)}


def test_the_loss_is_that_of_the_first_pass() -> None:
    model = make_model()
    expected = loss_of(model, make_batch())
    optimizer = make_frozen("SAM", model)
    assert torch.equal(optimizer.step(closure_of(optimizer, model, make_batch())), expected)
