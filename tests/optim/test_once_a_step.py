"""Schedules are the user's code: each is asked once a step and group, and before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from sam_kernels import RWSAM, SAM
from sam_kernels.schedules import Interval, Radius, Tail
from tests.optim.family_runs import everything_of, make, two_steps
from tests.optim.problem import add_gradient, assert_same_bits, closure_of, make_batch, make_model, weights
from tests.optim.rwsam_problem import WAYS, losses_of
from tests.optim.rwsam_problem import make_batch as make_sampled_batch
from tests.optim.rwsam_problem import make_model as make_sampled_model


class Asked:
    """A schedule that notes for which steps it was asked."""

    def __init__(self, value: float = 0.1) -> None:
        self.value, self.steps = value, list[int]()

    def __call__(self, t: Any) -> Any:
        self.steps.append(int(t))
        return self.value * t / t


class AskedRadius(Radius):
    def __init__(self, rests: Callable[[int], bool] = lambda t: False) -> None:
        self.rests, self.asked, self.radii = rests, list[int](), list[int]()

    def takes_part(self, t: int) -> bool:
        self.asked.append(t)
        return not self.rests(t)

    def radius(self, info: Any) -> float:
        self.radii.append(info.t)
        return 0.1


def groups_of(model: nn.Module, *groups: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"params": list(model[i].parameters()), **group} for i, group in zip((0, 2), groups, strict=True)]


def one_step(how: str, optimizer: Any, model: nn.Module) -> None:
    closure = closure_of(optimizer, model, make_batch())
    if how == "closure":
        optimizer.step(closure)
    elif how == "m-SAM":
        optimizer.step([closure] * 3)
    elif how == "n-SAM":
        optimizer.step(closure, ascent_closure=closure)
    elif how == "two steps":
        two_steps(optimizer, model, make_batch())
    else:
        for _ in range(2):
            optimizer.backward(partial(add_gradient, model, share=0.5))
        optimizer.step()
        optimizer.zero_grad()


WAYS_TO_STEP = ["closure", "m-SAM", "n-SAM", "two steps", "backward"]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("how", WAYS_TO_STEP)
def test_rho_and_lambd_are_asked_once_a_step_and_group(how: str, capturable: bool) -> None:
    model = make_model()
    rhos, lambds = [Asked(), Asked(0.2)], [Asked(1.0), Asked(0.5)]
    groups = groups_of(model, *({"rho": rho, "lambd": lambd} for rho, lambd in zip(rhos, lambds, strict=True)))
    optimizer = SAM(groups, torch.optim.SGD, lr=0.1, capturable=capturable)
    for each in (*rhos, *lambds):
        each.steps.clear()
    for _ in range(3):
        one_step(how, optimizer, model)
    assert [each.steps for each in (*rhos, *lambds)] == [[1, 2, 3]] * 4


@pytest.mark.parametrize("how", WAYS_TO_STEP)
def test_a_radius_is_asked_once_whether_it_takes_part_and_once_each_ascent(how: str) -> None:
    model, radius = make_model(), AskedRadius(lambda t: t == 2)
    optimizer = SAM(groups_of(model, {}, {"rho": 0.1}), torch.optim.SGD, rho=radius, lr=0.1)
    for _ in range(3):
        one_step(how, optimizer, model)
    assert radius.asked == [1, 2, 3]
    ascents = {"m-SAM": 3, "backward": 2}.get(how, 1)
    assert radius.radii == [1] * ascents + [3] * ascents


@pytest.mark.parametrize("make_phases", [lambda rho: Interval(rho, every=2), lambda rho: Tail(rho, start=2)], ids=["interval", "tail"])
@pytest.mark.parametrize("how", ["closure", "m-SAM", "backward"])
def test_what_stands_inside_of_an_interval_or_a_tail_is_asked_in_its_steps(how: str, make_phases: Any) -> None:
    model, rho = make_model(), Asked()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=make_phases(rho), lr=0.1)
    rho.steps.clear()
    for _ in range(4):
        one_step(how, optimizer, model)
    assert rho.steps == ([1, 3] if isinstance(make_phases(rho), Interval) else [3, 4])


@pytest.mark.parametrize(
    ("name", "options"), [("LookSAM", {"k": 2}), ("RSAM", {}), ("VaSSO", {}), ("MomentumSAM", {}), ("S2SAM", {}), ("SAMSPS", {})]
)
def test_members_ask_once_too(name: str, options: dict[str, Any]) -> None:
    model, rho, lambd = make_model(), Asked(), Asked(0.5)
    optimizer = make(name, model.parameters(), rho=rho, lambd=lambd, **options)
    rho.steps.clear()
    lambd.steps.clear()
    for _ in range(3):
        one_step("closure", optimizer, model)
    assert rho.steps == lambd.steps == [1, 2, 3]


@pytest.mark.parametrize("how", ["closure", "m-SAM", "backward"])
@pytest.mark.parametrize("way", WAYS)
def test_rwsam_asks_once_for_beta_too(way: str, how: str) -> None:
    model, batch = make_sampled_model(), make_sampled_batch()
    rho, beta = Asked(), Asked(2.0)
    optimizer = RWSAM(model, torch.optim.SGD, beta=beta, rho=rho, lr=0.1, **WAYS[way])
    rho.steps.clear()
    beta.steps.clear()
    closure = partial(losses_of, model, batch)
    for _ in range(3):
        if how == "backward":
            optimizer.backward(closure)
            optimizer.backward(closure)
            optimizer.step()
            optimizer.zero_grad()
        else:
            optimizer.step([closure, closure] if how == "m-SAM" else closure)
    assert rho.steps == beta.steps == [1, 2, 3]


def test_recording_and_first_step_ask_once_together() -> None:
    model, batch = make_sampled_model(), make_sampled_batch()
    rho, beta = Asked(), Asked(2.0)
    optimizer = RWSAM(model, torch.optim.SGD, beta=beta, rho=rho, lr=0.1)
    rho.steps.clear()
    beta.steps.clear()
    for _ in range(2):
        with optimizer.recording():
            losses = losses_of(model, batch)
        optimizer.weighted_backward(losses)
        optimizer.first_step(zero_grad=True)
        losses_of(model, batch).mean().backward()
        optimizer.second_step(zero_grad=True)
    assert rho.steps == beta.steps == [1, 2]


@pytest.mark.parametrize("how", WAYS_TO_STEP)
def test_a_random_radius_perturbs_as_often_as_it_is_positive(how: str) -> None:
    model, calls = make_model(), []
    draws = iter([0.1, 0.0, 0.0, 0.1, 0.1, 0.0])
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=lambda t: next(draws) if t > 1 or calls else 0.1, lr=0.1)
    calls.append(1)
    perturbed = []
    for _ in range(6):
        before = weights(model)
        moved: list[bool] = []
        hook = model.register_forward_hook(
            lambda *_, before=before, moved=moved: moved.append(not torch.equal(weights(model)[0], before[0]))
        )
        one_step(how, optimizer, model)
        hook.remove()
        perturbed.append(any(moved))
    assert perturbed == [True, False, False, True, True, False]


# --- bad values ---


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("option", ["rho", "lambd"])
@pytest.mark.parametrize("how", WAYS_TO_STEP)
def test_a_bad_value_is_found_before_anything_is_written(how: str, option: str, capturable: bool) -> None:
    model = make_model()
    schedule = lambda t: torch.as_tensor(-1.0 if t == 2 else 0.5, dtype=torch.float64) if capturable else (-1.0 if t == 2 else 0.5)  # noqa: E731
    optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=0.01, capturable=capturable, **{option: schedule})
    one_step(how, optimizer, model)
    before = everything_of(optimizer, model)
    for _ in range(2):
        with pytest.raises(ValueError, match=option):
            one_step(how, optimizer, model)
        assert_same_bits(everything_of(optimizer, model), before)
        assert int(optimizer.param_groups[0]["sam_step"]) == 1
    optimizer.param_groups[0][option] = 0.5
    optimizer.zero_grad()
    one_step(how, optimizer, model)
    assert int(optimizer.param_groups[0]["sam_step"]) == 2


@pytest.mark.parametrize("how", WAYS_TO_STEP)
def test_a_bad_radius_is_found_before_the_weights_move(how: str) -> None:
    class Bad(Radius):
        def radius(self, info: Any) -> float:
            return -1.0

    model = make_model()
    optimizer = SAM(groups_of(model, {"rho": 0.1}, {"rho": Bad()}), torch.optim.SGD, lr=0.1)
    before = weights(model)
    with pytest.raises(ValueError, match=r"Bad\.radius must be a finite number in \[0"):
        one_step(how, optimizer, model)
    assert_same_bits(weights(model), before)
    assert optimizer.param_groups[0]["sam_step"] == 0
