"""Radii, intervals and learning rates over time, for every member."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels import schedules
from tests.optim.family import BASES, MEMBERS, ONE_PASS
from tests.optim.family_runs import CASES, ONE_CASE_EACH, close, make, using
from tests.optim.problem import assert_same_bits, closure_of, every_backend, gradients, loss_of, make_batch, make_model, twin, weights
from tests.optim.transcriptions import Transcription


def counted(closure: Callable[[], Tensor], calls: list[int]) -> Callable[[], Tensor]:
    def counting() -> Tensor:
        calls.append(1)
        return closure()

    return counting


def transcribed(name: str, base: str, model: nn.Module) -> Transcription:
    base_class, kwargs = BASES[base]
    kwargs = {"lr": MEMBERS[name].options["gamma_b"], "weight_decay": 0.1, **kwargs} if name == "SAMSPS" else kwargs
    return MEMBERS[name].transcribe(model, base_class(model.parameters(), **kwargs))


@every_backend
@pytest.mark.parametrize(("name", "base"), [case for case in CASES if case.values[0] != "SAMSPS"])
def test_rho_zero_everywhere_is_the_base_optimizer_bit_for_bit(backend: str, name: str, base: str) -> None:
    model, other = make_model(), make_model()
    base_class, kwargs = BASES[base]
    calls: list[int] = []
    with using(backend):
        optimizer, plain = make(name, model.parameters(), base, rho=0.0), base_class(other.parameters(), **kwargs)
        for k in range(5):
            optimizer.step(counted(closure_of(optimizer, model, make_batch(seed=k)), calls))
            plain.step(closure_of(plain, other, make_batch(seed=k)))
    assert_same_bits(weights(model), weights(other))
    assert len(calls) == 5


@every_backend
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_sam_sps_with_rho_zero_is_sgd_with_the_polyak_step_of_the_only_loss(backend: str, momentum: float) -> None:
    model = make_model(torch.float64)
    other, calls = twin(model), []
    f_star, gamma_b = 0.1, 0.4
    with using(backend):
        optimizer = sam_kernels.SAMSPS(model.parameters(), rho=0.0, f_star=f_star, gamma_b=gamma_b, weight_decay=0.0, momentum=momentum)
        plain = torch.optim.SGD(other.parameters(), lr=1.0, momentum=momentum)
        for k in range(5):
            batch = make_batch(torch.float64, seed=k)
            optimizer.step(counted(closure_of(optimizer, model, batch), calls))
            grads = gradients(other, batch)
            gamma = min((loss_of(other, batch).item() - f_star) / sum(g.square().sum().item() for g in grads), gamma_b)
            for param in other.parameters():
                param.grad.mul_((1 - momentum) * gamma)  # type: ignore[union-attr]
            plain.step()
    close(weights(model), weights(other))
    assert len(calls) == 5


@every_backend
@pytest.mark.parametrize(
    "radius",
    [lambda rho: schedules.Interval(rho, every=3), lambda rho: schedules.Tail(rho, start=3)],
    ids=["every third", "from the fourth on"],
)
@pytest.mark.parametrize(("name", "base"), ONE_CASE_EACH)
def test_steps_without_an_ascent_are_the_bases(backend: str, name: str, base: str, radius: Callable[[float], Any]) -> None:
    """LookSAM's own interval is 3 as well: its steps between are its own. SAM-SPS: the Polyak step of the loss where the weights are."""
    model = make_model(torch.float64)
    other, rho, calls = twin(model), radius(MEMBERS[name].rho), []
    with using(backend):
        optimizer, expected = make(name, model.parameters(), base, rho=rho), transcribed(name, base, other)
        for t in range(1, 9):
            batch = make_batch(torch.float64, seed=t)
            optimizer.step(counted(closure_of(optimizer, model, batch), calls))
            expected.t = t - 1
            if rho.takes_part(t) or (name == "LookSAM" and expected.memory):
                expected.step(batch)
            elif name == "SAMSPS":
                usual, expected.rho = expected.rho, 0.0
                expected.step(batch)
                expected.rho = usual
            else:
                g = expected.gradients(batch)
                expected.memory = g if name == "S2SAM" else expected.memory  # of plain steps too
                Transcription.base_step(expected, g)
            close(weights(model), weights(other))
    ascents = sum(rho.takes_part(t) and (name != "LookSAM" or t % 3 == 1) for t in range(1, 9))
    assert len(calls) == 8 + ascents * (0 if name in ONE_PASS else 2 if name == "CRSAM" else 1)


def test_looksams_interval_and_the_radius_both_have_a_say() -> None:
    """k = 3 and every second step: t = 1, 7, 13; between, what t = 1 found."""
    model, calls = make_model(), []
    optimizer = make("LookSAM", model.parameters(), rho=schedules.Interval(0.05, every=2))
    for t in range(1, 8):
        before = len(calls)
        optimizer.step(counted(closure_of(optimizer, model, make_batch(seed=t)), calls))
        assert len(calls) - before == (2 if t in (1, 7) else 1)


@pytest.mark.filterwarnings("ignore:Detected call of")  # the transcription of SAM-SPS makes its step without the base
@pytest.mark.parametrize(("name", "base"), CASES)
def test_schedulers_of_torch_move_the_learning_rate(name: str, base: str) -> None:
    """Of the base, of decoupled WSAM's second step, and SAM-SPS's bound."""
    model = make_model(torch.float64)
    other = twin(model)
    optimizer, expected = make(name, model.parameters(), base), transcribed(name, base, other)
    ours, theirs = (torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (optimizer, expected.base))
    for k in range(6):
        batch = make_batch(torch.float64, seed=k)
        optimizer.step(closure_of(optimizer, model, batch))
        expected.step(batch)
        ours.step()
        theirs.step()
        close(weights(model), weights(other))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(BASES[base][1].get("lr", MEMBERS["SAMSPS"].options["gamma_b"]) / 64)


@pytest.mark.parametrize("scheduled", [True, False])
def test_gsams_radius_follows_the_learning_rate(scheduled: bool) -> None:
    model = make_model(torch.float64)
    other = twin(model)
    options = {"rho_max": 0.2, "rho_min": 0.05, "lr_max": 0.1, "lr_min": 0.02}
    optimizer = sam_kernels.GSAM(model.parameters(), torch.optim.SGD, lr=0.1, alpha=0.6, **options)
    base = torch.optim.SGD(other.parameters(), lr=0.1)
    expected = MEMBERS["GSAM"].transcribe(other, base)
    ours, theirs = (torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.2, total_iters=4) for each in (optimizer, base))
    for k in range(6):
        lr = base.param_groups[0]["lr"]
        expected.rho = 0.05 + (0.2 - 0.05) * (lr - 0.02) / (0.1 - 0.02)
        batch = make_batch(torch.float64, seed=k)
        optimizer.step(closure_of(optimizer, model, batch))
        expected.step(batch)
        if scheduled:
            ours.step()
            theirs.step()
        close(weights(model), weights(other))


class Listening(schedules.Radius):
    """ρ = 0.1 and what it was told."""

    def __init__(self) -> None:
        self.heard: list[schedules.AscentInfo] = []

    def radius(self, info: schedules.AscentInfo) -> float:
        self.heard.append(info)
        return 0.1


@every_backend
@pytest.mark.parametrize("scale", [1.0, 2.0**10])
@pytest.mark.parametrize(("name", "base"), ONE_CASE_EACH)
def test_a_radius_sees_the_norm_of_the_direction_without_a_scale(backend: str, name: str, base: str, scale: float) -> None:
    """‖d‖ of this member, ‖T d‖ where adaptive; and the loss of the first pass, where there is one."""
    model = make_model(torch.float64)
    other = twin(model)
    radius, scaler = Listening(), torch.amp.GradScaler("cpu", init_scale=scale)
    member = MEMBERS[name]
    base_class, kwargs = BASES[base]
    kwargs = {"lr": member.options["gamma_b"], "weight_decay": 0.1, **kwargs} if name == "SAMSPS" else kwargs
    expected = member.transcribe(other, base_class(other.parameters(), **kwargs), rho=0.1, adaptive=True, eta=0.1)
    with using(backend):
        optimizer = make(name, model.parameters(), base, rho=radius, adaptive=True, eta=0.1)
        for k in range(4):
            batch = make_batch(torch.float64, seed=k)

            def closure(batch: Any = batch) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                scaler.scale(loss).backward()
                return loss

            heard = len(radius.heard)
            loss = optimizer.step(closure, grad_scaler=scaler)
            expected.step(batch)
            if len(radius.heard) == heard:  # the first step of those with one pass, LookSAM's between
                assert name in (*ONE_PASS, "LookSAM")
                continue
            info = radius.heard[-1]
            assert info.norm.item() == pytest.approx(expected.norm, rel=1e-12)
            assert (info.loss is None) if name in ONE_PASS else (info.loss == loss)
    assert len(radius.heard) == {"MomentumSAM": 3, "S2SAM": 3, "LookSAM": 2}.get(name, 4)
