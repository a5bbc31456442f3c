"""A ``Direction`` of one's own: all it has is an ``AscentStep``, which cannot be misused without words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import SAM, functional
from sam_kernels.optim.descents import Descent
from sam_kernels.optim.directions import Direction, Extragradient, FirstGradient, PerturbOptions, Use
from tests.optim.family_runs import close, make
from tests.optim.problem import assert_same_bits, closure_of, make_batch, make_model, twin, weights


class OwnNorm(Direction):
    """Takes the norm by itself, and reports to nobody."""

    name = "own-norm"

    def norm(self, step: Any, group_grads: Any, grad_scale: Any) -> Tensor:
        return torch.stack([grad.norm() for current in group_grads for grad in current.grads]).norm()


class Looks(OwnNorm):
    """Looks at ``found_inf`` as well, and does not write it."""

    name = "looks"

    def norm(self, step: Any, group_grads: Any, grad_scale: Any) -> Tensor:
        assert step.found_inf.shape == ()
        return super().norm(step, group_grads, grad_scale)


class Tells(OwnNorm):
    """Sets ``found_inf``, and returns a norm that is finite whatever happens."""

    name = "tells"

    def norm(self, step: Any, group_grads: Any, grad_scale: Any) -> Tensor:
        norm = super().norm(step, group_grads, grad_scale)
        step.found_inf.logical_or_(~norm.isfinite())
        return norm.nan_to_num(1.0, 1.0, 1.0)


class Twice(Direction):
    """Takes two norms, and needs the first one afterwards."""

    name = "twice"

    def norm(self, step: Any, group_grads: Any, grad_scale: Any) -> Tensor:
        usual = step.norm(group_grads)
        plain = step.norm(group_grads, normalised=False)
        assert not torch.equal(usual, plain)
        return usual


class Average(Direction):
    """VaSSO, written with what an ``AscentStep`` offers."""

    name = "average"
    keeps = ("own_average",)

    def group_grads(self, step: Any) -> Any:
        self.begun = []
        for current in step.grads():
            kept = step.kept("own_average", current.lists)
            new = [g.clone() if m is None else 0.7 * m + 0.3 * g for m, g in zip(kept, current.grads, strict=True)]
            step.keep("own_average", current.lists, new)
            self.begun.append(len(step.begun))
        return step.grads()

    def norm(self, step: Any, group_grads: Any, grad_scale: Any) -> Tensor:
        return step.combined([functional.grad_norm(step.kept("own_average", current.lists)) for current in group_grads])

    def perturb_options(self, step: Any, current: Any) -> PerturbOptions:
        return PerturbOptions(ema=step.kept("own_average", current.lists), kind="vasso")


def own(direction: Direction, model: Any, **options: Any) -> Any:
    return SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.05, direction=direction, **options)


def spoiled(optimizer: Any, model: Any, bad_call: int) -> Callable[[], Tensor]:
    calls: list[int] = []

    def closure() -> Tensor:
        loss = closure_of(optimizer, model, make_batch())()
        calls.append(1)
        if len(calls) == bad_call:
            model[0].weight.grad[0, 0] = float("nan")
        return loss

    return closure


@pytest.mark.parametrize("direction", [OwnNorm(), Looks(), Tells()], ids=lambda each: each.name)
@pytest.mark.parametrize(("bad_call", "micro_batches"), [(1, 1), (2, 1), (1, 2), (3, 2), (4, 2)])
def test_a_step_after_a_skipped_one_is_a_step(direction: Direction, bad_call: int, micro_batches: int) -> None:
    model = make_model()
    optimizer = own(direction, model)
    before = weights(model)
    closure = spoiled(optimizer, model, bad_call)
    optimizer.step([closure] * micro_batches)
    assert_same_bits(weights(model), before)
    assert optimizer.skipped_steps == 1
    other = twin(model)
    expected = SAM(other.parameters(), torch.optim.SGD, lr=0.1, rho=0.05)
    optimizer.step(closure_of(optimizer, model, make_batch()))
    expected.step(closure_of(expected, other, make_batch()))
    assert optimizer.skipped_steps == 1
    close(weights(model), weights(other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", [OwnNorm(), Looks(), Tells()], ids=lambda each: each.name)
def test_a_bad_second_micro_batch_skips_the_step(direction: Direction) -> None:
    """The descent gradients are finite: only the norm of the ascent knows."""
    model = make_model()
    optimizer = own(direction, model, check_finite=False)
    before = weights(model)
    closure = closure_of(optimizer, model, make_batch())
    optimizer.step([closure, spoiled(optimizer, model, 1)])
    assert_same_bits(weights(model), before)
    assert optimizer.skipped_steps == 1


def test_two_norms_of_one_step_are_two() -> None:
    model = make_model()
    other = twin(model)
    optimizer = own(Twice(), model, adaptive=True, eta=0.1)
    expected = SAM(other.parameters(), torch.optim.SGD, lr=0.1, rho=0.05, adaptive=True, eta=0.1)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, model, make_batch()))
        expected.step(closure_of(expected, other, make_batch()))
    assert_same_bits(weights(model), weights(other))


def test_an_average_is_kept_between_steps_and_in_checkpoints() -> None:
    model = make_model(torch.float64)
    other = twin(model)
    direction = Average()
    optimizer, expected = own(direction, model), make("VaSSO", other.parameters(), "sgd", rho=0.05, theta=0.3)
    begun = []
    for step in range(4):
        if step == 2:
            state = optimizer.state_dict()
            optimizer = own(direction, model)
            optimizer.load_state_dict(state)
        batch = make_batch(torch.float64, step)
        optimizer.step(closure_of(optimizer, model, batch))
        expected.step(closure_of(expected, other, batch))
        begun += direction.begun
        close(weights(model), weights(other))
    assert begun == [4, 0, 0, 0]


class Wrong(Direction):
    def __init__(self, act: Callable[[Any, Any], Any]) -> None:
        self.act = act

    def norm(self, step: Any, group_grads: Any, grad_scale: Any) -> Any:
        return self.act(step, group_grads[0].lists)


class WrongKeeper(Wrong):
    keeps = ("mine",)


@pytest.mark.parametrize(
    ("kind", "act", "error", "words"),
    [
        (Wrong, lambda step, lists: 1.0, TypeError, r"Wrong\.norm must return a floating-point tensor of one element, got 1\.0"),
        (Wrong, lambda step, lists: None, TypeError, r"Wrong\.norm must return .* got NoneType"),
        (Wrong, lambda step, lists: torch.ones(2), TypeError, r"Wrong\.norm must return .* shape \(2,\)"),
        (Wrong, lambda step, lists: step.kept("mine", lists), ValueError, r"keeps nothing, not 'mine'; write keeps = \('mine',\)"),
        (WrongKeeper, lambda step, lists: step.kept("yours", lists), ValueError, "keeps 'mine', not 'yours'"),
        (WrongKeeper, lambda step, lists: step.keep("yours", lists, []), ValueError, "keeps 'mine', not 'yours'"),
        (WrongKeeper, lambda step, lists: step.keep("mine", lists, []), ValueError, r"keep\('mine'\): got 0 tensors for 4 parameters"),
        (
            WrongKeeper,
            lambda step, lists: step.keep("mine", lists, [torch.ones(3)] * 4),
            ValueError,
            r"keep\('mine'\): tensors\[0\] must have the shape \(9, 6\) of its parameter, got a torch\.float32 tensor of shape \(3,\)",
        ),
    ],
)
def test_wrong_use_has_words(kind: Any, act: Any, error: Any, words: str) -> None:
    model = make_model()
    optimizer = own(kind(act), model)
    before = weights(model)
    with pytest.raises(error, match=words):
        optimizer.step(closure_of(optimizer, model, make_batch()))
    assert_same_bits(weights(model), before)
    assert optimizer.param_groups[0]["sam_step"] == 0


class OldOptions(Direction):
    def perturb_options(self, step: Any, current: Any) -> Any:
        return {"grad_scale": None}


def test_options_of_another_type_are_refused() -> None:
    model = make_model()
    optimizer = own(OldOptions(), model)
    before = weights(model)
    with pytest.raises(TypeError, match=r"OldOptions\.perturb_options must return a directions\.PerturbOptions, got dict"):
        optimizer.step(closure_of(optimizer, model, make_batch()))
    assert_same_bits(weights(model), before)


@pytest.mark.parametrize(
    ("part", "name", "words"),
    [
        (Direction, "sign", "override is_downhill"),
        (Direction, "knows_maximize", "override is_downhill"),
        (Direction, "begins_elsewhere", r"first_gradient = FirstGradient\.ELSEWHERE"),
        (Direction, "needs_no_gradient", r"first_gradient = FirstGradient\.NONE"),
        (Direction, "rewrites_descent", "override descent_norm"),
        (Direction, "is_scaled", r"PerturbOptions\(is_scaled=False\)"),
        (Direction, "is_capturable", r"Use\.CAPTURE"),
        (Descent, "is_plain", "override rewrite"),
        (Descent, "needs_loss", "override check_loss"),
        (Descent, "needs_closure", r"Use\.TWO_STEPS"),
        (Descent, "is_capturable", r"Use\.CAPTURE"),
        (Descent, "can_clip", r"Use\.CLIPPING"),
        (Descent, "makes_gradient", r"Use\.BACKWARD"),
    ],
)
@pytest.mark.parametrize("place", ["class", "base", "instance"])
def test_an_attribute_of_earlier_versions_is_refused_by_name(part: Any, name: str, words: str, place: str) -> None:
    kind = type("Mine", (part,), {"name": "mine"} if place == "instance" else {"name": "mine", name: True})
    mine = (type("Mine", (kind,), {}) if place == "base" else kind)()
    if place == "instance":
        mine.__dict__[name] = True
    with pytest.raises(TypeError, match=rf"Mine\.{name} is an attribute of earlier versions, which is no longer read; .*{words}"):
        SAM(make_model().parameters(), torch.optim.SGD, lr=0.1, **{"direction" if part is Direction else "descent": mine})


class Downhill(Direction):
    """The extragradient method's, by the method that says so."""

    name = "downhill"

    def is_downhill(self, maximize: bool) -> bool:
        return not maximize


@pytest.mark.parametrize("maximize", [False, True])
def test_a_direction_says_which_way_it_goes(maximize: bool) -> None:
    model = make_model()
    other = twin(model)
    optimizer, expected = own(Downhill(), model, maximize=maximize), own(Extragradient(), other, maximize=maximize)
    optimizer.step(closure_of(optimizer, model, make_batch()))
    expected.step(closure_of(expected, other, make_batch()))
    assert_same_bits(weights(model), weights(other))


class RefusingDirection(Direction):
    name = "refuses"

    def refuses(self, use: Use) -> bool:
        return True


class RefusingDescent(Descent):
    name = "refuses"

    def refuses(self, use: Use) -> bool:
        return True


class MomentsFirst(Direction):
    name = "moments-first"
    first_gradient = FirstGradient.NONE


@pytest.mark.parametrize("part", [RefusingDirection(), RefusingDescent()], ids=lambda part: part.role)
def test_what_a_part_refuses_is_refused(part: Any) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=f"max_grad_norm is not defined for {part.role} 'refuses'"):
        SAM(model.parameters(), torch.optim.SGD, lr=0.1, **{part.role: part}, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="capturable=True, but what 'refuses' does at a step is decided, or drawn, by the host"):
        SAM(model.parameters(), torch.optim.SGD, lr=0.1, **{part.role: part}, capturable=True)
    optimizer: Any = SAM(model.parameters(), torch.optim.SGD, lr=0.1, **{part.role: part})
    with pytest.raises(ValueError, match=rf"SAM\.backward: {part.role} 'refuses' chooses more than a gradient"):
        optimizer.backward(closure_of(optimizer, model, make_batch()))
    with pytest.raises(RuntimeError, match=r"SAM\.first_step: SAM needs step"):
        optimizer.first_step()


def test_a_direction_without_a_gradient_takes_no_ascent_closure() -> None:
    model = make_model()
    optimizer = own(MomentsFirst(), model)
    with pytest.raises(ValueError, match="'moments-first' takes no gradient before the ascent"):
        optimizer.step(closure_of(optimizer, model, make_batch()), ascent_closure=lambda: None)
