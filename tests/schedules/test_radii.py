"""Radii and mixes: values by hand, steps written out, capturable ones, checkpoints, bad input."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels import schedules, theory
from sam_kernels.schedules import (
    AlmostConstantRadius,
    DecreasingRadius,
    Interval,
    InverseNorm,
    LinearLambda,
    LinearRadius,
    LRProportional,
    Tail,
)
from tests.optim.problem import assert_same_bits, make_batch, make_model, twin, weights, written_out_step
from tests.schedules.rules import BY_HAND, OPTIONS, LossOverNorm, make, train

every_rule = pytest.mark.parametrize("rule", OPTIONS)


@pytest.mark.parametrize("rule", BY_HAND)
def test_steps_follow_the_formula(rule: str) -> None:
    """ρ_t = 0 is a plain step of the base with one call of the closure."""
    model = make_model(torch.float64)
    optimizer, scheduler = make(model, OPTIONS[rule]())
    expected_model = twin(model)
    base = torch.optim.SGD(expected_model.parameters(), lr=0.1, momentum=0.9)
    for k, (rho, lambd) in enumerate(BY_HAND[rule]):
        base.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        assert train(model, optimizer, scheduler, range(k, k + 1)) == [2 if rho else 1]
        written_out_step(expected_model, base, make_batch(torch.float64, seed=k), rho=rho, lambd=lambd)
        for got, expected in zip(weights(model), weights(expected_model), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_almost_constant_is_the_string() -> None:
    models = [make_model() for _ in range(2)]
    for model, rho in zip(models, ("0.3/k^0.7", AlmostConstantRadius(0.3, 0.7)), strict=True):
        train(model, *make(model, {"rho": rho}), range(6))
    assert_same_bits(*(weights(model) for model in models))


def test_decreasing_is_the_theory_s() -> None:
    steps = [theory.pl_decreasing_steps(t, 0.1, 1.0, 0.5, 1.0, 0.5)[0] for t in range(100)]
    rule = DecreasingRadius(theory.pl_constant_steps(0.1, 1.0, 0.5, 1.0, 0.5)[0])
    assert [rule(t) for t in range(1, 101)] == steps
    assert steps[0] > steps[-1]


BY_STEP = [AlmostConstantRadius(0.1), DecreasingRadius(0.2), LinearRadius(0.1, 0.7, 9), LinearLambda(0.9, 0.1, 7)]


@pytest.mark.parametrize("rule", BY_STEP, ids=repr)
def test_of_a_tensor_they_make_a_tensor(rule: Any) -> None:
    for t in (1, 2, 5, 8, 10, 1000):
        made = rule(torch.tensor(float(t), dtype=torch.float64))
        assert made.shape == ()
        assert made.dtype is torch.float64
        # C / t^p: a power of torch's and one of C's library, each within an ulp.
        assert made.item() == pytest.approx(rule(t), rel=1e-15 if isinstance(rule, AlmostConstantRadius) else 0, abs=0)


def test_linear_ends_exactly_and_never_beyond() -> None:
    for first, last in ((0.1, 0.7), (1.0, 1 / 3), (0.0, 1.0), (1.0, 1.0)):
        rule = LinearLambda(first, last, 49)
        values = [rule(t) for t in range(1, 60)]
        assert (values[0], values[49:]) == (first, [last] * 10)
        assert all(min(first, last) <= value <= max(first, last) for value in values)


@every_rule
def test_capturable_steps_are_the_same(rule: str) -> None:
    """But that the closure runs twice: which steps ascend is nothing that the host knows."""
    model = make_model(torch.float64)
    other = twin(model)
    optimizer, scheduler = make(model, OPTIONS[rule](), capturable=True)
    assert train(model, optimizer, scheduler, range(7)) == [2] * 7
    train(other, *make(other, OPTIONS[rule]()), range(7))
    for got, expected in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@every_rule
@pytest.mark.parametrize("capturable", [False, True])
def test_save_load_continue_is_bit_exact(rule: str, capturable: bool) -> None:
    """At every step, so that intervals are cut anywhere."""
    whole = make_model()
    train(whole, *make(whole, OPTIONS[rule](), capturable=capturable), range(6))
    for cut in range(1, 6):
        model = make_model()
        optimizer, scheduler = make(model, OPTIONS[rule](), capturable=capturable)
        train(model, optimizer, scheduler, range(cut))
        file = io.BytesIO()
        torch.save([each.state_dict() for each in (model, optimizer, scheduler)], file)
        file.seek(0)
        resumed = make_model()
        parts = (resumed, *make(resumed, OPTIONS[rule](), capturable=capturable))
        for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        train(*parts, range(cut, 6))
        assert_same_bits(weights(resumed), weights(whole))


@every_rule
@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_copies_continue_alike(rule: str, how: Callable[[Any], Any]) -> None:
    model = make_model()
    optimizer, scheduler = make(model, OPTIONS[rule]())
    train(model, optimizer, scheduler, range(2))
    copied_model, copied = how((model, optimizer))
    for each, one in ((model, optimizer), (copied_model, copied)):
        train(each, one, torch.optim.lr_scheduler.ConstantLR(one, 1.0), range(2, 5))
    assert_same_bits(weights(copied_model), weights(model))


@every_rule
def test_they_say_what_they_are(rule: str) -> None:
    for value in OPTIONS[rule]().values():
        assert eval(repr(value), {**vars(schedules), "LossOverNorm": LossOverNorm}) == value


def test_a_group_that_rests_is_in_no_norm() -> None:
    """And each group has a rule of its own."""
    params = [nn.Parameter(torch.tensor([start], dtype=torch.float64)) for start in (3.0, 4.0)]
    groups = [{"params": [params[0]], "rho": Interval(0.5, 2)}, {"params": [params[1]]}]
    optimizer = sam_kernels.SAM(groups, torch.optim.SGD, lr=0.0, rho=0.5)
    seen: list[list[float]] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append([param.item() for param in params])
        loss = sum(param.square().sum() / 2 for param in params)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert seen[1] == pytest.approx([3.3, 4.4])  # along (3, 4) / 5
    assert seen[3] == [3.0, pytest.approx(4.5)]


WRAPPED: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.tensor(0.1),
    "string": lambda: "0.1/k^0",
    "callable": lambda: lambda t: 0.1,
    "interval": lambda: Interval(0.1, 1),
    "radius": lambda: LRProportional(0.1, 0.1, 1.0, 0.0),
}


@pytest.mark.parametrize("rho", WRAPPED.values(), ids=WRAPPED)
def test_phases_wrap_whatever_a_radius_may_be(rho: Callable[[], Any]) -> None:
    for wrap in (lambda rho: Interval(rho, 2), lambda rho: Tail(rho, 1)):
        models = [make_model() for _ in range(2)]
        calls = [train(model, *make(model, {"rho": wrap(each)}), range(4)) for model, each in zip(models, (0.1, rho()), strict=True)]
        assert calls[0] == calls[1]
        for got, expected in zip(*(weights(model) for model in models), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)  # 0.1 in float32 is another number


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AlmostConstantRadius(-1.0), ValueError, r"AlmostConstantRadius: C must be a finite number in \[0.0, inf\), got -1.0"),
        (lambda: AlmostConstantRadius("1"), TypeError, "AlmostConstantRadius: C must be a number, got '1'"),
        (lambda: AlmostConstantRadius(1.0, -0.1), ValueError, "AlmostConstantRadius: p must be"),
        (lambda: DecreasingRadius(-0.1), ValueError, "DecreasingRadius: rho_max must be"),
        (lambda: LinearRadius(-0.1, 0.1, 5), ValueError, "LinearRadius: first must be"),
        (lambda: LinearRadius(0.1, float("nan"), 5), ValueError, "LinearRadius: last must be"),
        (lambda: LinearLambda(1.1, 0.1, 5), ValueError, r"LinearLambda: first must be a finite number in \[0.0, 1.0\], got 1.1"),
        (lambda: LinearLambda(1.0, 0.1, 0), ValueError, "LinearLambda: steps must be at least 1, got 0"),
        (lambda: LinearLambda(1.0, 0.1, 2.0), TypeError, "LinearLambda: steps must be an integer"),
        (lambda: Interval(-0.1, 2), ValueError, "Interval: rho must be"),
        (lambda: Interval("0.1/t", 2), ValueError, "rho must be a number, 'C/k"),
        (lambda: Interval(None, 2), TypeError, "Interval: rho must be a number, got NoneType"),
        (lambda: Interval(0.1, 0), ValueError, "Interval: every must be at least 1, got 0"),
        (lambda: Interval(0.1, 2, start=-1), ValueError, "Interval: start must be at least 0, got -1"),
        (lambda: Tail(True, 2), TypeError, "Tail: rho must be a number, got True"),
        (lambda: Tail(0.1, 2.5), TypeError, "Tail: start must be an integer"),
        (lambda: InverseNorm(-0.1), ValueError, "InverseNorm: sigma must be"),
        (lambda: InverseNorm("0.1"), TypeError, "InverseNorm: sigma must be a number, got '0.1'"),
        (lambda: InverseNorm(0.1, float("inf")), ValueError, "InverseNorm: rho_max must be"),
        (lambda: LRProportional(-0.1, 0.0, 1.0, 0.0), ValueError, "LRProportional: rho_max must be"),
        (
            lambda: LRProportional(0.1, 0.2, 1.0, 0.0),
            ValueError,
            r"rho_min must be a finite number in \[0.0, 0.1\], got 0.2",
        ),
        (
            lambda: LRProportional(0.1, 0.0, 1.0, 1.0),
            ValueError,
            r"lr_min must be a finite number in \[0.0, 1.0\), got 1.0",
        ),
        (lambda: LRProportional(0.1, 0.0, "1", 1.0), TypeError, "LRProportional: lr_max must be a number"),
        (lambda: make(make_model(), {"lambd": Interval(0.1, 2)}), TypeError, "SAM: lambd must be a number, .*got Interval"),
        (lambda: make(make_model(), {"rho": Interval}), TypeError, "missing"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
