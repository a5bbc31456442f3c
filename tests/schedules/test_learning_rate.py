"""Learning rates by hand, and the manners of PyTorch's own schedulers: chained, in sequence, resumed, on tensors, group by group."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import sam_kernels
from sam_kernels import schedules, theory
from tests.optim.problem import assert_same_bits, closure_of, make_batch, make_model, weights

MU = 0.5
LN3, LN4, LN5 = math.log(3), math.log(4), math.log(5)
# Factors of the initial learning rate for e = 0, 1, …, written out.
BY_HAND: dict[str, list[float]] = {
    "Constant": [1.0] * 12,
    "Diminish1": [1 / e for e in range(1, 13)],
    "Diminish2": [1.0, 1.0, *(1 / e**0.5001 for e in range(2, 12))],
    "Diminish3": [1.0, *[1 / (3 * LN3)] * 5, *[1 / (4 * LN4)] * 5, 1 / (5 * LN5)],
}
RULES: dict[str, Callable[..., Any]] = {
    **{name: getattr(schedules, name) for name in BY_HAND},
    "PLDecreasing": lambda optimizer, **more: schedules.PLDecreasing(optimizer, MU, **more),
}
every_rule = pytest.mark.parametrize("rule", RULES)
# Those that multiply, and what by; those that set the rate, whatever it was.
MULTIPLYING: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, step_size=2, gamma=0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, milestones=[1, 4], gamma=0.3),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, gamma=0.9),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, factor=0.25, total_iters=3),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, start_factor=0.2, total_iters=4),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=20, power=2.0),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda e: 0.8),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=20),
    "Diminish2": schedules.Diminish2,
}
SETTING: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda e: 1 / (e + 2)),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=3),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.3, total_steps=20, cycle_momentum=False),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, base_lr=0.01, max_lr=0.1, step_size_up=3, cycle_momentum=False),
}


def make_optimizer(lr: float | Tensor = 0.1, *, kind: str = "sam") -> Any:
    params = [nn.Parameter(torch.ones(3, dtype=torch.float64))]
    return sam_kernels.SAM(params, torch.optim.SGD, lr=lr) if kind == "sam" else torch.optim.AdamW(params, lr=lr)


def rates(optimizer: Any, scheduler: Any, count: int, group: int = 0) -> list[float]:
    """The group's learning rate in each of ``count`` epochs."""
    seen = []
    for _ in range(count):
        seen.append(float(optimizer.param_groups[group]["lr"]))
        optimizer.step()
        scheduler.step()
    return seen


def factor(rule: str, e: int, lr: float = 0.1) -> float:
    return min(1.0, (2 * e + 1) / ((e + 1) ** 2 * MU) / lr) if rule == "PLDecreasing" else BY_HAND[rule][e]


def rounded(count: int) -> float:
    """Relative error of a product of ``count`` factors, each of which is rounded, divided and multiplied by: six roundings are plenty."""
    return 6 * count * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("kind", ["sam", "adamw"])
@pytest.mark.parametrize("rule", BY_HAND)
def test_rates_by_hand(rule: str, kind: str) -> None:
    optimizer = make_optimizer(kind=kind)
    scheduler = RULES[rule](optimizer)
    expected = [0.1 * each for each in BY_HAND[rule]]
    assert rates(optimizer, scheduler, 12) == pytest.approx(expected, rel=rounded(12), abs=0)


def test_rates_for_pl_functions_are_those_of_the_theory() -> None:
    A, B, L, lambd, T = 2.0, 0.5, 3.0, 0.5, 400
    _, gamma = theory.pl_constant_steps(MU, L, A, B, lambd)
    optimizer = make_optimizer(gamma)
    expected = [theory.pl_decreasing_steps(t, MU, L, A, B, lambd)[1] for t in range(T)]
    assert expected[0] == gamma > expected[-1]  # both sides of the minimum are met
    assert rates(optimizer, schedules.PLDecreasing(optimizer, MU), T) == pytest.approx(expected, rel=rounded(T), abs=0)


def test_keywords() -> None:
    optimizer = make_optimizer()
    assert rates(optimizer, schedules.Diminish2(optimizer, exponent=1.0), 4) == pytest.approx([0.1, 0.1, 0.05, 0.1 / 3], rel=1e-14)
    optimizer = make_optimizer()
    expected = [0.1, *[0.1 / (2 * math.log(2))] * 2, 0.1 / (3 * LN3)]
    assert rates(optimizer, schedules.Diminish3(optimizer, first=2, period=2), 4) == pytest.approx(expected, rel=1e-14)


@every_rule
def test_the_closed_form_is_the_same(rule: str) -> None:
    """What torch asks for where a scheduler is set to an epoch, as SequentialLR does."""
    optimizer = make_optimizer()
    scheduler = RULES[rule](optimizer)
    for e in range(12):
        (closed,) = scheduler._get_closed_form_lr()
        assert scheduler.get_last_lr() == pytest.approx([closed], rel=rounded(e + 1), abs=0)
        assert closed == pytest.approx(0.1 * factor(rule, e), rel=rounded(1))
        optimizer.step()
        scheduler.step()


@every_rule
@pytest.mark.parametrize("other", MULTIPLYING)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_beside_one_that_multiplies_the_rate_is_the_product(rule: str, other: str, first: bool) -> None:
    count = 10
    alone = make_optimizer()
    theirs = [rate / 0.1 for rate in rates(alone, MULTIPLYING[other](alone), count)]
    optimizer = make_optimizer()
    makers = [RULES[rule], MULTIPLYING[other]]
    chained = lr_scheduler.ChainedScheduler([make(optimizer) for make in (makers if first else makers[::-1])], optimizer)
    expected = [0.1 * factor(rule, e) * theirs[e] for e in range(count)]
    assert rates(optimizer, chained, count) == pytest.approx(expected, rel=2 * rounded(count), abs=0)


@every_rule
@pytest.mark.parametrize("other", MULTIPLYING | SETTING)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_beside_any_it_does_what_multiplicative_lr_does(rule: str, other: str, first: bool) -> None:
    """The bits of torch's scheduler that multiplies by factor(e) / factor(e - 1), in the same place beside the same one."""
    seen = []
    for ours in (True, False):
        optimizer = make_optimizer()
        closed = RULES[rule](make_optimizer())

        def ratio(e: int, closed: Any = closed) -> float:  # factor(0) is 1 for this rate, and torch's does not ask for it
            return float(closed._factor(e, 0.1) / closed._factor(e - 1, 0.1))

        mine = RULES[rule] if ours else (lambda opt, ratio=ratio: lr_scheduler.MultiplicativeLR(opt, ratio))
        makers = [mine, (MULTIPLYING | SETTING)[other]]
        chained = lr_scheduler.ChainedScheduler([make(optimizer) for make in (makers if first else makers[::-1])], optimizer)
        seen.append(rates(optimizer, chained, 10))
    assert seen[0] == seen[1]


def test_beside_one_that_watches_a_metric() -> None:
    optimizer = make_optimizer()
    scheduler = schedules.Diminish1(optimizer)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        plateau.step(1.0)  # the first is the best; each later one halves
    assert seen == pytest.approx([0.1, 0.1 / 2, 0.1 / 3 / 2, 0.1 / 4 / 4], rel=1e-14)


@every_rule
def test_after_a_warm_up_in_a_sequence(rule: str) -> None:
    optimizer = make_optimizer()
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=3)
    sequence = lr_scheduler.SequentialLR(optimizer, [warm_up, RULES[rule](optimizer)], milestones=[3])
    expected = [0.1 * f for f in (0.25, 0.5, 0.75)] + [0.1 * factor(rule, e) for e in range(6)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The epoch parameter")  # of older torch, about its own call
        assert rates(optimizer, sequence, 9) == pytest.approx(expected, rel=rounded(9), abs=0)


@every_rule
def test_before_another_in_a_sequence(rule: str) -> None:
    optimizer = make_optimizer()
    later = lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=100)
    sequence = lr_scheduler.SequentialLR(optimizer, [RULES[rule](optimizer), later], milestones=[3])
    expected = [0.1 * factor(rule, e) for e in range(3)] + [0.05] * 3
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The epoch parameter")
        assert rates(optimizer, sequence, 6) == pytest.approx(expected, rel=rounded(6), abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_rule
def test_a_rate_in_a_tensor_is_filled(rule: str, dtype: torch.dtype) -> None:
    lr = torch.tensor(0.1, dtype=dtype)
    optimizer = make_optimizer(lr)
    scheduler = RULES[rule](optimizer)
    seen = rates(optimizer, scheduler, 10)
    assert optimizer.param_groups[0]["lr"] is lr
    last = scheduler.get_last_lr()[0]
    assert isinstance(last, Tensor)
    assert last is not lr
    tolerance = rounded(10) * torch.finfo(dtype).eps / torch.finfo(torch.float64).eps
    assert seen == pytest.approx([0.1 * factor(rule, e) for e in range(10)], rel=tolerance, abs=0)


@every_rule
def test_groups_have_their_own_initial_rate(rule: str) -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = sam_kernels.SAM([{"params": [params[0]], "lr": 0.1}, {"params": [params[1]], "lr": 8.0}], torch.optim.SGD, lr=1.0)
    scheduler = RULES[rule](optimizer)
    for e in range(5):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [0.1 * factor(rule, e), 8.0 * factor(rule, e, 8.0)], rel=rounded(e + 1)
        )
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("rule", BY_HAND)
def test_a_group_added_later_is_scheduled_too(rule: str) -> None:
    optimizer = make_optimizer()
    scheduler = RULES[rule](optimizer)
    rates(optimizer, scheduler, 2)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 1.0})
    optimizer.step()
    scheduler.step()
    ratio = BY_HAND[rule][3] / BY_HAND[rule][2]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * BY_HAND[rule][3], ratio], rel=rounded(4))


def test_a_rate_of_zero_stays_zero() -> None:
    for lr in (0.0, torch.tensor(0.0)):
        optimizer = make_optimizer(lr)
        assert rates(optimizer, schedules.PLDecreasing(optimizer, MU), 3) == [0.0] * 3


@pytest.mark.parametrize("capturable", [False, True])
@every_rule
def test_save_load_continue_is_bit_exact(rule: str, capturable: bool) -> None:
    """In the middle, beside another scheduler."""

    def make(model: nn.Module) -> tuple[Any, Any]:
        lr = torch.tensor(2.0, dtype=torch.float64) if capturable else 2.0
        optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=lr, momentum=0.9, capturable=capturable)
        return optimizer, lr_scheduler.ChainedScheduler([RULES[rule](optimizer), lr_scheduler.ExponentialLR(optimizer, 0.7)], optimizer)

    def train(model: nn.Module, optimizer: Any, scheduler: Any, steps: range) -> None:
        for k in steps:
            optimizer.step(closure_of(optimizer, model, make_batch(seed=k)))
            scheduler.step()

    model = make_model()
    optimizer, scheduler = make(model)
    train(model, optimizer, scheduler, range(4))
    file = io.BytesIO()
    torch.save([each.state_dict() for each in (model, optimizer, scheduler)], file)
    train(model, optimizer, scheduler, range(4, 8))
    resumed_model = make_model()
    resumed, resumed_scheduler = make(resumed_model)
    file.seek(0)
    for each, state in zip((resumed_model, resumed, resumed_scheduler), torch.load(file, weights_only=True), strict=True):
        each.load_state_dict(state)
    train(resumed_model, resumed, resumed_scheduler, range(4, 8))
    assert_same_bits(weights(resumed_model), weights(model))
    assert float(resumed.param_groups[0]["lr"]) == float(optimizer.param_groups[0]["lr"])
    assert resumed_scheduler.get_last_lr() == scheduler.get_last_lr()


@every_rule
def test_made_anew_with_last_epoch(rule: str) -> None:
    """Torch's other way to resume: the optimizer's checkpoint and the epoch before, without the scheduler's state."""
    optimizer = make_optimizer()
    scheduler = RULES[rule](optimizer)
    rates(optimizer, scheduler, 4)
    resumed = make_optimizer(7.0)
    resumed.load_state_dict(optimizer.state_dict())
    again = RULES[rule](resumed, last_epoch=scheduler.last_epoch - 1)
    assert rates(resumed, again, 4) == rates(optimizer, scheduler, 4)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_options_travel_with_the_state(how: Callable[[Any], Any]) -> None:
    optimizer = make_optimizer()
    scheduler = schedules.Diminish3(optimizer, first=5, period=1)
    state = how(scheduler.state_dict())
    other = schedules.Diminish3(make_optimizer())
    other.load_state_dict(state)
    assert (other.first, other.period, other.last_epoch) == (5, 1, 0)


def test_get_lr_outside_a_step_warns() -> None:
    with pytest.warns(UserWarning, match=r"get_last_lr\(\)"):
        schedules.Diminish1(make_optimizer()).get_lr()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda opt: schedules.Diminish1(3), TypeError, "int is not an Optimizer"),
        (lambda opt: schedules.Diminish1(opt, last_epoch=2), KeyError, "initial_lr"),
        (lambda opt: schedules.Diminish2(opt, exponent=0.0), ValueError, r"Diminish2: exponent must be a finite number in \(0.0, inf\)"),
        (lambda opt: schedules.Diminish2(opt, exponent="1"), TypeError, "Diminish2: exponent must be a number, got '1'"),
        (lambda opt: schedules.Diminish3(opt, first=1), ValueError, "Diminish3: first must be at least 2, got 1"),
        (lambda opt: schedules.Diminish3(opt, period=0), ValueError, "Diminish3: period must be at least 1, got 0"),
        (lambda opt: schedules.Diminish3(opt, period=2.5), TypeError, "Diminish3: period must be an integer"),
        (lambda opt: schedules.PLDecreasing(opt, 0.0), ValueError, r"PLDecreasing: mu must be a finite number in \(0.0, inf\)"),
        (lambda opt: schedules.PLDecreasing(opt, None), TypeError, "PLDecreasing: mu must be a number"),
    ],
)
def test_bad_input(call: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    optimizer = make_optimizer()
    with pytest.raises(error, match=message):
        call(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1
