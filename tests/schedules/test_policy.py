"""AE-SAM's policy: which steps ascend, by the norms of earlier ones."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels import schedules
from sam_kernels._reading import Reading
from sam_kernels.optim import descents, directions
from sam_kernels.schedules import AdaptivePolicy, Interval, Tail
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
    written_out_step,
)

DTYPE = torch.float64


def loud(k: int) -> tuple[Tensor, Tensor]:
    """Batches of unlike losses, so that norms go up and down."""
    inputs, targets = make_batch(DTYPE, seed=k)
    return inputs, targets * (1.0 + 0.4 * math.sin(2.3 * k))


def decided(norms: list[float], *, decay: float, c: Callable[[int], float]) -> bool:
    """Whether n_t ≥ m_t + c_t sqrt(v_t) for the last of these norms, over all of them."""
    mean, variance = norms[0] ** 2, 0.0
    for norm in norms:
        mean = decay * mean + (1 - decay) * norm**2
        variance = decay * variance + (1 - decay) * (norm**2 - mean) ** 2
    return norms[-1] ** 2 >= mean + c(len(norms)) * math.sqrt(variance)


def train(optimizer: Any, model: nn.Module, steps: range, how: str = "closure") -> list[int]:
    """How often each step called the closure, or made a backward pass that ascends."""
    found = []
    for k in steps:
        calls, batch = [0], loud(k)

        def closure(batch: Any = batch, calls: list[int] = calls, zeroes: bool = how == "closure") -> Tensor:
            calls[0] += 1
            return (closure_of(optimizer, model, batch) if zeroes else partial(add_gradient, model, batch))()

        if how == "closure":
            optimizer.step(closure)
        elif how == "backward":
            optimizer.backward(closure)
            optimizer.step()
            optimizer.zero_grad()
        else:
            closure()
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step(zero_grad=True)
        found.append(calls[0])
    return found


def sgd(model: nn.Module, rho: Any, **options: Any) -> Any:
    return sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.5, rho=rho, **options)


@every_backend
@pytest.mark.parametrize("options", [{}, {"adaptive": True, "eta": 0.1, "scale": 0.5, "lambd": 0.7}], ids=["sam", "asam"])
@pytest.mark.parametrize("delay", [1, 2])
@pytest.mark.parametrize("c", [0.3, lambda t: 1.0 - 0.2 * t], ids=["number", "schedule"])
def test_twelve_steps_follow_the_formula(backend: str, c: Any, delay: int, options: dict[str, Any]) -> None:
    model = make_model(DTYPE)
    other, norms, ascents = twin(model), [], []
    with sam_kernels.use_backend(backend):
        optimizer = sgd(model, AdaptivePolicy(0.2, decay=0.7, c=c, delay=delay), **options)
        base = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.5)
        for k in range(12):
            past = norms[: max(len(norms) + 1 - delay, 0)]
            ascents.append(not past or decided(past, decay=0.7, c=c if callable(c) else lambda t: c))
            assert train(optimizer, model, range(k, k + 1)) == [1 + ascents[-1]]
            scaling = [0.5 * (param.abs() + 0.1) if options else torch.ones_like(param) for param in weights(other)]
            grads = gradients(other, loud(k))
            norms.append(math.sqrt(sum((s * g).square().sum().item() for s, g in zip(scaling, grads, strict=True))))
            written_out_step(other, base, loud(k), rho=0.2 if ascents[-1] else 0.0, **options)
            for got, wanted in zip(weights(model), weights(other), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)
    assert {True, False} == set(ascents[delay:])


@pytest.mark.parametrize("how", ["backward", "two steps"])
def test_other_loops_decide_alike(how: str) -> None:
    models = [make_model(DTYPE) for _ in range(2)]
    calls = [
        train(sgd(model, AdaptivePolicy(0.2, decay=0.7)), model, range(8), each)
        for model, each in zip(models, ("closure", how), strict=True)
    ]
    if how == "backward":
        assert calls[0] == calls[1]
    assert {1, 2} == set(calls[0])
    assert_same_bits(weights(models[0]), weights(models[1]))


def test_a_loss_scale_and_clipping_change_no_decision() -> None:
    model, other = make_model(DTYPE), make_model(DTYPE)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaled, plain = (sgd(net, AdaptivePolicy(0.2, decay=0.7), max_grad_norm=1e-2) for net in (model, other))
    for k in range(8):

        def closure(k: int = k) -> Tensor:
            scaled.zero_grad()
            loss = loss_of(model, loud(k))
            scaler.scale(loss).backward()
            return loss

        scaled.step(closure, grad_scaler=scaler)
        train(plain, other, range(k, k + 1))
    for got, wanted in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bad_step", [0, 4])
def test_a_skipped_step_counts_for_nothing(bad_step: int) -> None:
    """One of SAM, and a plain one; and a step without any gradient."""
    model, policy = make_model(DTYPE), AdaptivePolicy(0.2, decay=0.7, c=100.0)
    optimizer = sgd(model, policy)
    train(optimizer, model, range(bad_step))
    before = policy.state_dict()

    def closure() -> Tensor:
        loss = closure_of(optimizer, model, loud(0))()
        model[0].bias.grad[0] = float("nan")  # type: ignore[index, union-attr]
        return loss

    optimizer.step(closure)
    assert optimizer.skipped_steps == 1
    for param in model.parameters():
        param.requires_grad_(False)
    optimizer.step(lambda: optimizer.zero_grad())
    policy.at_step(bad_step + 3)
    after = policy.state_dict()
    if bad_step == 0:
        assert (after["mean"], after["ascends"]) == (None, True)
    else:
        (t, norm), mean = before["pending"][0], before["mean"]
        assert after["mean"] == pytest.approx(0.7 * mean + 0.3 * norm**2, rel=1e-14)
        assert t == bad_step


@pytest.mark.parametrize("norm", [0.0, 1e-90, 1e90, 1e200, math.inf, math.nan])
@pytest.mark.parametrize("earlier", [[], [2.0]], ids=["first", "later"])
def test_a_norm_without_a_fourth_power_counts_for_nothing(norm: float, earlier: list[float]) -> None:
    policies = [AdaptivePolicy(0.2, decay=0.7) for _ in range(2)]
    for policy, norms in zip(policies, (earlier, [*earlier, norm]), strict=True):
        for t, each in enumerate(norms, 1):
            policy.observe(t, torch.tensor(each, dtype=DTYPE))
        policy.at_step(len(norms) + 1)
    assert policies[0].state_dict() == policies[1].state_dict()


@pytest.mark.parametrize("decay", [0.0, 1e-9, 0.3])
def test_averages_err_by_their_own_terms_alone(decay: float) -> None:
    """A norm after one that was 10^8 times as long: with 53 bits, m = decay m + (1 - decay) n errs by at most 4 u of its two terms, and n
    itself is the average without memory, which every step then reaches."""
    policy = AdaptivePolicy(0.2, decay=decay)
    for t, norm in enumerate((1e8, 1.1), 1):
        policy.observe(t, torch.tensor(norm, dtype=DTYPE))
        policy.at_step(t + 1)
    exact = Fraction(decay) * Fraction(1e8**2) + (1 - Fraction(decay)) * Fraction(1.1**2)
    assert abs(Fraction(policy.state_dict()["mean"]) - exact) <= 4 * exact * Fraction(2) ** -53
    assert decay != 0.0 or policy.takes_part(3)


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("delay", [1, 2])
def test_a_run_that_is_continued_decides_alike(how: str, delay: int) -> None:
    def made(model: nn.Module) -> tuple[Any, AdaptivePolicy]:
        policy = AdaptivePolicy(0.2, decay=0.7, delay=delay)
        return sgd(model, policy), policy

    for cut in range(1, 8):
        model = make_model(DTYPE)
        optimizer, policy = made(model)
        train(optimizer, model, range(cut))
        if how == "state_dict":
            other = twin(model)
            resumed, its_policy = made(other)
            resumed.load_state_dict(through_a_file(optimizer.state_dict()))
            its_policy.load_state_dict(json.loads(json.dumps(policy.state_dict())))
            assert resumed.param_groups[0]["rho"] is its_policy
        elif how == "deepcopy":
            other, resumed = copy.deepcopy((model, optimizer))
        else:
            other, resumed = pickle.loads(pickle.dumps((model, optimizer)))
        assert train(resumed, other, range(cut, 9)) == train(optimizer, model, range(cut, 9))
        assert_same_bits(weights(other), weights(model))


def test_no_norm_is_read_before_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a delay of 2 the host may be one step ahead of the device."""
    read: list[int] = []
    model, policy = make_model(DTYPE), AdaptivePolicy(0.2, delay=2)
    optimizer = sgd(model, policy)
    learn = policy._learn
    monkeypatch.setattr(policy, "_learn", lambda t, reading: (read.append(t), learn(t, reading)))
    for k in range(5):
        train(optimizer, model, range(k, k + 1))
        assert read == list(range(1, k))


def test_the_same_norm_may_be_written_over_by_the_next_step() -> None:
    norm = torch.tensor(3.0)
    reading = Reading(norm)
    norm.fill_(7.0)
    assert reading.value() == 3.0


def test_a_step_that_was_undone_is_decided_and_counted_once() -> None:
    models = [make_model(DTYPE) for _ in range(2)]
    policies = [AdaptivePolicy(0.2, decay=0.7) for _ in models]
    optimizers = [sgd(model, policy) for model, policy in zip(models, policies, strict=True)]

    def closure() -> Tensor:
        closure_of(optimizers[0], models[0], loud(99))()
        if not torch.equal(weights(models[0])[0], before[0]):
            raise RuntimeError("out of memory")
        return torch.zeros(())

    for k in range(6):
        before = weights(models[0])
        if k in (0, 2):
            policies[0]._ascends = True
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizers[0].step(closure)
        for optimizer, model in zip(optimizers, models, strict=True):
            train(optimizer, model, range(k, k + 1))
        if k == 0:
            assert policies[0].state_dict() == policies[1].state_dict()


def test_groups_share_it_and_others_rest() -> None:
    """A group whose radius is the number 0 is in no norm, of plain steps neither, and is not moved."""
    policy, model = AdaptivePolicy(0.2, decay=0.7), make_model(DTYPE)
    other = twin(model)
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias]}, {"params": list(model[2].parameters()), "rho": 0.0}]
    both = [{"params": list(other[0].parameters())}, {"params": list(other[2].parameters()), "rho": 0.0}]
    optimizer = sam_kernels.SAM(groups, torch.optim.SGD, lr=0.05, rho=policy)
    expected = sam_kernels.SAM(both, torch.optim.SGD, lr=0.05, rho=AdaptivePolicy(0.2, decay=0.7))
    calls: list[int] = []
    for k in range(8):
        wanted = torch.cat([grad.flatten() for grad in gradients(model, loud(k))[:2]]).norm().item()
        calls += train(optimizer, model, range(k, k + 1))
        assert calls[-1:] == train(expected, other, range(k, k + 1))
        assert policy.state_dict()["pending"] == [(k + 1, pytest.approx(wanted, rel=1e-13))]
        for got, right in zip(weights(model), weights(other), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-13)
    assert set(calls) == {1, 2}


@pytest.mark.parametrize("descent", [descents.SurrogateGap(), descents.Look(3), descents.Polyak()], ids=lambda part: part.name)
def test_rules_of_descent_go_with_it(descent: Any) -> None:
    """Of a plain step the gradient is looked at before a rule writes it."""
    model, seen = make_model(DTYPE), []
    policy = AdaptivePolicy(0.2, decay=0.7)
    optimizer = sgd(model, policy, descent=descent)
    observe = policy.observe
    policy.observe = lambda t, norm: (seen.append((t, norm.item())), observe(t, norm))  # type: ignore[method-assign]
    for k in range(6):
        wanted = math.sqrt(sum(grad.square().sum().item() for grad in gradients(model, loud(k))))
        train(optimizer, model, range(k, k + 1))
        assert seen[k] == (k + 1, pytest.approx(wanted, rel=1e-13))
    assert len(seen) == 6


def test_the_radius_inside_has_its_own_steps() -> None:
    model = make_model(DTYPE)
    assert train(sgd(model, AdaptivePolicy(Tail(0.2, start=3), c=-1e9)), model, range(5)) == [1, 1, 1, 2, 2]


REFUSED: list[tuple[Callable[[nn.Module], Any], type[Exception], str]] = [
    (
        lambda model: sgd(model, AdaptivePolicy(0.1), capturable=True),
        TypeError,
        "AdaptivePolicy: with capturable=True no step can be left out",
    ),
    (lambda model: sgd(model, AdaptivePolicy(0.1), direction=directions.Stale()), ValueError, "direction 'stale' has another"),
    (lambda model: sgd(model, AdaptivePolicy(0.1), direction=directions.VarianceSuppressed()), ValueError, "direction 'vasso' has another"),
    (
        lambda model: sam_kernels.SAM(
            [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "rho": 0.1}],  # type: ignore[index]
            torch.optim.SGD,
            lr=0.1,
            rho=AdaptivePolicy(0.1),
        ),
        ValueError,
        r"SAM: param_groups\[1\] has another radius than the AdaptivePolicy of other groups",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED)
def test_what_it_does_not_go_with(make: Callable[[nn.Module], Any], error: type[Exception], message: str) -> None:
    model = make_model()
    optimizer, before = make(model), weights(model)
    for how in ("closure", "backward"):
        with pytest.raises(error, match=message):
            train_on_floats(optimizer, model, how)
        assert_same_bits(weights(model), before)
        assert int(optimizer.param_groups[0]["sam_step"]) == 0


def train_on_floats(optimizer: Any, model: nn.Module, how: str) -> None:
    closure = closure_of(optimizer, model, make_batch())
    optimizer.step(closure) if how == "closure" else optimizer.backward(closure)


def test_several_gradients_a_step_are_refused() -> None:
    model = make_model()
    optimizer = sgd(model, AdaptivePolicy(0.1))
    closure = closure_of(optimizer, model, make_batch())
    for call in (lambda: optimizer.step([closure, closure]), lambda: optimizer.step(closure, ascent_closure=lambda: closure())):
        with pytest.raises(ValueError, match="AdaptivePolicy decides by the norm of one gradient a step"):
            call()
    assert optimizer.param_groups[0]["sam_step"] == 0
    optimizer.zero_grad()
    backward = partial(add_gradient, model)
    optimizer.backward(backward)
    with pytest.raises(ValueError, match="call backward once a step"):
        optimizer.backward(backward)


def test_rwsam_is_refused() -> None:
    model = make_model()
    optimizer = sam_kernels.RWSAM(model, torch.optim.SGD, beta=1.0, lr=0.1, rho=AdaptivePolicy(0.1))
    with pytest.raises(ValueError, match="RWSAM: AdaptivePolicy decides by the gradient's norm"):
        optimizer.step(lambda: (model(make_batch()[0]) - make_batch()[1]).square().mean(1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AdaptivePolicy(-0.1), ValueError, "rho must be"),
        (lambda: AdaptivePolicy(None), TypeError, "rho must be"),
        (lambda: AdaptivePolicy(AdaptivePolicy(0.1)), TypeError, "AdaptivePolicy: rho must be another radius"),
        (lambda: Interval(AdaptivePolicy(0.1), 2), TypeError, r"Interval: rho must not be AdaptivePolicy, .* AdaptivePolicy\(Interval\("),
        (lambda: AdaptivePolicy(0.1, decay=1.0), ValueError, "AdaptivePolicy: decay must be"),
        (lambda: AdaptivePolicy(0.1, c=float("nan")), ValueError, "AdaptivePolicy: c must be"),
        (lambda: AdaptivePolicy(0.1, c="1"), TypeError, "AdaptivePolicy: c must be a number"),
        (lambda: AdaptivePolicy(0.1, delay=0), ValueError, "AdaptivePolicy: delay must be at least 1"),
        (lambda: AdaptivePolicy(0.1).load_state_dict({}), KeyError, "mean"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_it_says_what_it_is() -> None:
    policy = AdaptivePolicy(Tail(0.1, 3), c=0.5, delay=2)
    assert repr(eval(repr(policy), vars(schedules))) == repr(policy)
