"""Radii that follow the training: what they are told, what may come back, and rules that use it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import sam_kernels
from sam_kernels.schedules import AscentInfo, Interval, InverseNorm, LRProportional, Radius, Tail
from tests.optim.problem import (
    assert_same_bits,
    closure_of,
    every_backend,
    every_base,
    gradients,
    loss_of,
    make_batch,
    make_model,
    twin,
    weights,
    written_out_step,
)
from tests.schedules.rules import LossOverNorm, make, train

LR_OF_GROUP = LRProportional(rho_max=0.2, rho_min=0.05, lr_max=0.1, lr_min=0.02)


class Told(Radius):
    """Remembers what it was told; answers as it is asked to."""

    def __init__(self, answer: Callable[[AscentInfo], Any] = lambda info: 0.1) -> None:
        self.answer = answer
        self.infos: list[AscentInfo] = []

    def radius(self, info: AscentInfo) -> Any:
        self.infos.append(info)
        return self.answer(info)


def sgd(model: nn.Module, rho: Any, **options: Any) -> Any:
    return sam_kernels.SAM(model.parameters(), torch.optim.SGD, **{"lr": 0.1, "rho": rho, **options})


def norm_of(grads: list[Tensor]) -> float:
    return math.sqrt(sum(grad.double().square().sum().item() for grad in grads))


@pytest.mark.parametrize("adaptive", [False, True])
def test_what_they_are_told(adaptive: bool) -> None:
    model, batch = make_model(torch.float64), make_batch(torch.float64)
    norms: list[float] = []  # read at once: the tensor is the optimizer's own and keeps its place
    told = Told(lambda info: norms.append(info.norm.item()) or 0.1)
    optimizer = sgd(model, told, adaptive=adaptive, eta=0.01)
    for t in (1, 2):
        loss = loss_of(model, batch).item()
        scaling = [param.abs() + 0.01 if adaptive else torch.ones_like(param) for param in weights(model)]
        norm = norm_of([s * g for s, g in zip(scaling, gradients(model, batch), strict=True)])
        optimizer.step(closure_of(optimizer, model, batch))
        info = told.infos[-1]
        assert (info.t, len(told.infos)) == (t, t)
        assert info.group is optimizer.param_groups[0]
        assert norms[-1] == pytest.approx(norm, rel=1e-14)
        assert isinstance(info.loss, Tensor)
        assert (info.loss.item(), info.loss.shape, info.loss.requires_grad) == (loss, (), False)


def test_the_norm_is_over_the_groups_that_take_part() -> None:
    model, batch = make_model(torch.float64), make_batch(torch.float64)
    norms: list[float] = []
    told = Told(lambda info: norms.append(info.norm.item()) or 0.1)
    groups = [{"params": model[0].parameters(), "rho": told}, {"params": model[2].parameters(), "rho": Interval(told, 2)}]
    optimizer = sam_kernels.SAM(groups, torch.optim.SGD, lr=0.1)
    for parts in (model, model[0]):
        grads = gradients(model, batch)[: len(list(parts.parameters()))]
        optimizer.step(closure_of(optimizer, model, batch))
        assert norms[-1] == pytest.approx(norm_of(grads), rel=1e-14)
    assert [info.group is optimizer.param_groups[0] for info in told.infos] == [True, False, True]


@pytest.mark.parametrize("radius", [Interval, Tail])
def test_a_tensor_on_the_cpu_goes_where_the_step_is(radius: Any) -> None:
    """torch masks nothing with a mask on another device; "meta" would not mind."""
    devices = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.masked_fill:
                devices.append([each.device.type for each in args[:2]])
            return func(*args, **(kwargs or {}))

    elsewhere = torch.ones((), dtype=torch.float64, device="meta")
    with Watch():
        value = radius(torch.tensor(0.1), 2).radius(AscentInfo(elsewhere, {}, elsewhere, None))
    assert devices == [["meta", "meta"]]
    assert (value.device.type, value.shape) == ("meta", ())


@pytest.mark.parametrize("lambd", [1.0, 0.3])
def test_a_scaled_loss_has_no_longer_norm(lambd: float) -> None:
    batch, norms, after = make_batch(), [], []
    for how in ("plain", "scaler", "two steps"):
        model = make_model()
        optimizer = sgd(model, Told(lambda info: norms.append(info.norm.item()) or info.norm.clamp(max=0.1)), lambd=lambd)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=how != "plain")

        def closure(optimizer: Any = optimizer, model: nn.Module = model, scaler: Any = scaler) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            return loss

        if how == "two steps":
            closure()
            optimizer.first_step(zero_grad=True, grad_scaler=scaler)
            closure()
            scaler.step(optimizer)
        else:
            optimizer.step(closure, grad_scaler=scaler if how == "scaler" else None)
        after.append(weights(model))
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-6)
    for each in after[1:]:
        for got, expected in zip(each, after[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_the_two_step_api_knows_no_loss() -> None:
    model, batch = make_model(), make_batch()
    told = Told()
    optimizer = sgd(model, told)
    loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, batch).backward()
    optimizer.second_step()
    assert [info.loss for info in told.infos] == [None]


RETURNED = [
    (0.5, 0.5),
    (2, 2),
    (None, None),
    (True, None),
    ((1.0, 2.0), None),
    (torch.ones(3), None),
    (torch.full((1, 1), 0.5), torch.tensor(0.5)),
]


@pytest.mark.parametrize(("returned", "loss"), RETURNED, ids=str)
def test_a_closure_may_return_anything(returned: Any, loss: Any) -> None:
    model, told = make_model(), Told()
    optimizer = sgd(model, told)
    closure = closure_of(optimizer, model, make_batch())
    optimizer.step(lambda: (closure(), returned)[1])
    assert told.infos[0].loss == loss


def test_each_micro_batch_has_its_own_ascent() -> None:
    model, told = make_model(torch.float64), Told()
    optimizer = sgd(model, told)
    batches = [make_batch(torch.float64, seed=k) for k in range(3)]
    losses = [loss_of(model, batch).item() for batch in batches]
    optimizer.step([closure_of(optimizer, model, batch) for batch in batches])
    assert [info.loss.item() for info in told.infos] == losses
    assert [info.t for info in told.infos] == [1, 1, 1]


def test_reweighted_sam_tells_its_own_norm_and_the_mean_loss() -> None:
    model, (inputs, targets) = make_model(torch.float64), make_batch(torch.float64)
    norms: list[float] = []
    told = Told(lambda info: norms.append(info.norm.item()) or 0.1)
    optimizer = sam_kernels.RWSAM(model, torch.optim.SGD, beta=0.0, rho=told, lr=0.1)
    norm = norm_of(gradients(model, (inputs, targets)))
    loss = optimizer.step(lambda: (model(inputs) - targets).square().mean(1))
    assert norms == pytest.approx([norm], rel=1e-12)
    assert told.infos[0].loss.item() == loss.item()


@every_backend
@every_base
def test_steps_of_loss_over_norm_are_written_out(backend: str, base: Any, kwargs: dict[str, Any]) -> None:
    model, batch = make_model(torch.float64), make_batch(torch.float64)
    other = twin(model)
    plain = base(other.parameters(), **kwargs)
    radii = []
    with sam_kernels.use_backend(backend):
        optimizer = sam_kernels.SAM(model.parameters(), base, rho=LossOverNorm(0.2), **kwargs)
        for _ in range(10):
            radii.append(min(0.2, 0.1 * loss_of(other, batch).item() / norm_of(gradients(other, batch))))
            optimizer.step(closure_of(optimizer, model, batch))
            written_out_step(other, plain, batch, rho=radii[-1])
            for got, expected in zip(weights(model), weights(other), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    assert len(set(radii)) > 2  # not the maximum all the time


def test_proportional_to_lr_by_hand() -> None:
    def at(lr: Any) -> Any:
        return LR_OF_GROUP.radius(AscentInfo(1, {"lr": lr}, torch.ones(()), None))

    for lr, rho in ((0.1, 0.2), (0.02, 0.05), (0.06, 0.125), (0.04, 0.0875), (0.5, 0.2), (0.0, 0.05)):
        assert at(lr) == pytest.approx(rho, rel=1e-14)
        made = at(torch.tensor(lr, dtype=torch.float64))
        assert (made.item(), made.shape) == (at(lr), ())
    assert (at(0.1), at(0.02), at(9.0), at(0.0)) == (0.2, 0.05, 0.2, 0.05)


@pytest.mark.parametrize("capturable", [False, True])
def test_proportional_to_lr_follows_a_scheduler_group_by_group(capturable: bool) -> None:
    model, batch = make_model(torch.float64), make_batch(torch.float64)
    other = twin(model)
    rate = torch.tensor(0.1, dtype=torch.float64) if capturable else 0.1
    optimizer = sgd(model, LR_OF_GROUP, lr=rate, capturable=capturable)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.6)
    base = torch.optim.SGD(other.parameters(), lr=0.1)
    for lr in (0.1, 0.06, 0.036, 0.0216, 0.01296):
        optimizer.step(closure_of(optimizer, model, batch))
        scheduler.step()
        base.param_groups[0]["lr"] = lr
        written_out_step(other, base, batch, rho=max(0.05, 0.05 + 0.15 * (lr - 0.02) / 0.08))
        for got, expected in zip(weights(model), weights(other), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("spoiled", [math.nan, math.inf])
@pytest.mark.parametrize(
    "answer", [lambda info: info.loss / info.norm, lambda info: info.loss.item() / info.norm.item()], ids=["tensor", "number"]
)
def test_a_gradient_that_is_not_finite_skips_the_step(answer: Callable[[AscentInfo], Any], spoiled: float) -> None:
    """Whatever the radius made of it, and whether or not it is one."""
    model, batch = make_model(), make_batch()
    optimizer = sgd(model, Told(answer), momentum=0.9)
    closure = closure_of(optimizer, model, batch)
    optimizer.step(closure)
    before, factor = weights(model), [spoiled]

    def spoil() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch) * factor[0]
        loss.backward()
        return loss

    optimizer.step(spoil)
    assert_same_bits(weights(model), before)
    assert optimizer.skipped_steps == 1
    optimizer.step(closure)
    assert optimizer.skipped_steps == 1
    assert not torch.equal(weights(model)[0], before[0])


@pytest.mark.parametrize("api", ["closure", "two-step"])
@pytest.mark.parametrize(
    ("answer", "capturable", "error", "message"),
    [
        (math.nan, False, ValueError, r"SAM: Told.radius must be a finite number in \[0.0, inf\), got nan"),
        (-0.1, False, ValueError, r"SAM: Told.radius must be a finite number in \[0.0, inf\), got -0.1"),
        (torch.tensor(-0.1), False, ValueError, "SAM: Told.radius must be a finite number"),
        (torch.tensor(math.nan), False, ValueError, "SAM: Told.radius must be a finite number"),
        (torch.ones(2), False, ValueError, r"SAM: Told.radius must be a number or a tensor that holds one, got .*\(2,\)"),
        (torch.tensor(1), False, TypeError, "SAM: Told.radius must be a number or a dense floating-point tensor"),
        (None, False, TypeError, "SAM: Told.radius must be a number, got NoneType"),
        (True, False, TypeError, "SAM: Told.radius must be a number, got True"),
        ("0.1/k^0.5", False, TypeError, "SAM: Told.radius must be a number"),
        (0.1, True, TypeError, "SAM: with capturable=True Told.radius must make a tensor"),
    ],
)
def test_a_wrong_answer_is_refused_and_the_weights_stay(
    answer: Any, capturable: bool, error: type[Exception], message: str, api: str
) -> None:
    """Of the second group, too: before the first has moved."""
    model, batch, at_first = make_model(), make_batch(), []
    told = Told(lambda info: at_first.append(weights(model)) or answer)
    groups = [{"params": model[0].parameters(), "rho": 0.1}, {"params": model[2].parameters()}]
    optimizer = sam_kernels.SAM(groups, torch.optim.SGD, lr=torch.tensor(0.1), rho=told, capturable=capturable)
    before = weights(model)
    closure_of(optimizer, model, batch)()
    with pytest.raises(error, match=message):
        optimizer.step(closure_of(optimizer, model, batch)) if api == "closure" else optimizer.first_step()
    assert_same_bits(weights(model), before)
    assert_same_bits(at_first[0], before)
    told.answer = lambda info: torch.tensor(0.1)
    optimizer.step(closure_of(optimizer, model, batch))
    assert not torch.equal(weights(model)[0], before[0])


def test_a_radius_without_its_method_is_no_radius() -> None:
    class Unfinished(Radius):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Unfinished()  # type: ignore[abstract]


def test_it_stays_with_the_program() -> None:
    """As callables: checkpoints hold none, and loading one leaves it."""
    model = make_model()
    optimizer, scheduler = make(model, {"rho": LR_OF_GROUP})
    train(model, optimizer, scheduler, range(2))
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["rho"] is None
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["rho"] == LR_OF_GROUP


def test_it_can_be_put_into_a_group_at_any_time() -> None:
    model = make_model(torch.float64)
    other = twin(model)
    optimizer, scheduler = make(model, {"rho": 0.3})
    constant, other_scheduler = make(other, {"rho": 0.3})
    for each, one, sched in ((model, optimizer, scheduler), (other, constant, other_scheduler)):
        train(each, one, sched, range(1))
    optimizer.param_groups[0]["rho"] = LRProportional(0.2, 0.2, 1.0, 0.0)
    constant.param_groups[0]["rho"] = 0.2
    for each, one, sched in ((model, optimizer, scheduler), (other, constant, other_scheduler)):
        train(each, one, sched, range(1, 3))
    assert_same_bits(weights(model), weights(other))


@every_backend
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("options", [{}, {"lambd": 0.3}, {"adaptive": True, "eta": 0.1}], ids=str)
def test_the_inverse_of_the_norm_written_out(backend: str, options: dict[str, Any], limited: bool) -> None:
    """sigma / ‖T g‖, with a maximum that is met in some of the steps."""
    rho_max = (0.08 if "eta" in options else 0.025) if limited else None
    model = make_model(torch.float64)
    other, is_met = twin(model), []
    with sam_kernels.use_backend(backend):
        optimizer = sgd(model, InverseNorm(0.02, rho_max), **options)
        base = torch.optim.SGD(other.parameters(), lr=0.1)
        for k in range(6):
            batch = make_batch(torch.float64, seed=k)
            scaling = [param.abs() + options["eta"] if "eta" in options else torch.ones_like(param) for param in weights(other)]
            rho = 0.02 / norm_of([s * g for s, g in zip(scaling, gradients(other, batch), strict=True)])
            is_met.append(rho_max is not None and rho > rho_max)
            optimizer.step(closure_of(optimizer, model, batch))
            written_out_step(other, base, batch, rho=min(rho, rho_max or rho), **options)
            for got, expected in zip(weights(model), weights(other), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    assert rho_max is None or len(set(is_met)) == 2


@every_backend
def test_a_gradient_of_zero_has_no_inverse_and_moves_nothing(backend: str) -> None:
    param, seen = nn.Parameter(torch.ones(1)), []

    def closure() -> float:
        seen.append(param.item())
        param.grad = torch.zeros(1)
        return 0.0

    with sam_kernels.use_backend(backend):
        optimizer = sam_kernels.SAM([param], torch.optim.SGD, lr=0.1, rho=InverseNorm(0.1))
        optimizer.step(closure)
    assert seen == [1.0, 1.0]
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize(("norm", "rho"), [(0.0, 0.0), (1e-42, 0.25), (1.0, 0.1), (3e38, 0.1 / 3e38)])
def test_the_inverse_of_norms_at_the_ends_of_float32(norm: float, rho: float) -> None:
    """One whose inverse is no float32 is held by rho_max."""
    found = InverseNorm(0.1, 0.25).radius(AscentInfo(1, {}, torch.tensor(norm), None))
    assert found.item() == pytest.approx(rho, rel=1e-6)
