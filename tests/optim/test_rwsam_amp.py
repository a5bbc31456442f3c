"""Row 5 for RW-SAM: an unmodified ``torch.amp.GradScaler``; row 4: several processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sam_kernels import RWSAM
from tests.helpers.ranks import on_ranks, one_at_a_time
from tests.optim.problem import assert_same_bits, every_base, twin, weights
from tests.optim.rwsam_problem import (
    CALLS,
    WAYS,
    Recorded,
    assert_close,
    build,
    every_way,
    losses_of,
    make_batch,
    make_model,
    state_of,
    written_out_step,
)
from tests.optim.scaler_flows import SCALE, InfOnPass


@every_way
@pytest.mark.parametrize("lambd", [1.0, 0.3])
@every_base
def test_row_05_scaled_training_is_unscaled_training(base: Any, kwargs: dict[str, Any], way: str, lambd: float) -> None:
    model = make_model(torch.float32)
    other = twin(model)
    scaled, plain = build(model, way, base, lambd=lambd, **kwargs), build(other, way, base, lambd=lambd, **kwargs)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for step in range(3):
        batch = make_batch(torch.float32, seed=step)
        scaled.step(lambda batch=batch: losses_of(model, batch), grad_scaler=scaler)
        scaler.update()
        plain.step(lambda batch=batch: losses_of(other, batch))
        assert_close(scaled.last_norms, plain.last_norms, 1e-5)
    for got, expected in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=5e-6, atol=1e-6)
    assert scaler.get_scale() == SCALE
    assert scaled.skipped_steps == 0


def scaled_step(api: str, optimizer: RWSAM, losses: Callable[[], Tensor], scaler: torch.amp.GradScaler) -> None:
    if api == "closure":
        optimizer.step(losses, grad_scaler=scaler)
    else:
        with optimizer.recording():
            first = losses()
        optimizer.weighted_backward(first, grad_scaler=scaler)
        optimizer.first_step(zero_grad=True, grad_scaler=scaler)
        scaler.scale(losses().mean()).backward()
        optimizer.second_step(zero_grad=True, grad_scaler=scaler)
    scaler.update()


@every_base
@pytest.mark.parametrize(
    ("way", "api", "bad_pass"),
    [(way, "closure", bad) for way in WAYS for bad in range(1, CALLS[way] + 1)] + [("exact", "two-step", 1), ("exact", "two-step", 2)],
)
def test_row_05_inf_in_any_pass_skips_the_whole_step(base: Any, kwargs: dict[str, Any], way: str, api: str, bad_pass: int) -> None:
    model, batch = make_model(torch.float32), make_batch(torch.float32)
    optimizer = build(model, way, base, **kwargs)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)

    def step(spoil: InfOnPass) -> None:
        scaled_step(api, optimizer, lambda: spoil(losses_of(model, batch)), scaler)

    step(InfOnPass(None))
    before, state = weights(model), state_of(optimizer)
    step(InfOnPass(bad_pass))
    assert_same_bits(weights(model), before)
    assert_same_bits(state_of(optimizer), state)
    assert optimizer.skipped_steps == 1
    assert scaler.get_scale() == SCALE / 2
    step(InfOnPass(None))
    assert optimizer.skipped_steps == 1


def test_row_05_a_closure_through_the_scaler_is_refused() -> None:
    model = make_model(torch.float32)
    optimizer = build(model, "exact")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match=r"GradScaler\.step"):
        scaler.step(optimizer, lambda: losses_of(model, make_batch(torch.float32)))


def _rank(rank: int) -> dict[str, Any]:
    model = make_model(torch.float32)
    ddp = DistributedDataParallel(model)
    optimizer = RWSAM(ddp, torch.optim.SGD, beta=2.0, rho=0.3, lr=0.1, momentum=0.9)
    seen = []
    for step in range(2):
        closure = Recorded(ddp, make_batch(torch.float32, seed=10 * step + rank))
        optimizer.step(closure)
        seen.append((closure.calls, optimizer.last_norms))
    # A schedule of β that begins at zero: both APIs climb without the others all the same.
    starts = []
    for api in ("closure", "two-step"):
        plain = make_model(torch.float32)
        wrapped = DistributedDataParallel(plain)
        optimizer = RWSAM(wrapped, torch.optim.SGD, beta=0.0, rho=0.3, lr=0.1)
        batch = make_batch(torch.float32, seed=rank)
        if api == "closure":
            optimizer.step(lambda: losses_of(wrapped, batch))  # noqa: B023 - called at once
        else:
            with optimizer.recording():
                losses = losses_of(wrapped, batch)
            optimizer.weighted_backward(losses)
            optimizer.first_step(zero_grad=True)
            losses_of(wrapped, batch).mean().backward()
            optimizer.second_step()
        starts.append(weights(plain))
    return {"weights": weights(model), "seen": seen, "starts": starts}


@one_at_a_time
def test_row_04_every_rank_climbs_by_itself_and_descends_with_the_others(tmp_path: Path) -> None:
    found = on_ranks(_rank, tmp_path)
    assert_same_bits(found[0]["weights"], found[1]["weights"])
    for rank in range(2):
        assert_close(found[rank]["starts"][1], found[rank]["starts"][0], 1e-6)
    model = make_model(torch.float32)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(2):
        start, total = weights(model), None
        for rank in range(2):
            alone, batch = twin(model), make_batch(torch.float32, seed=10 * step + rank)
            norms, _ = written_out_step(alone, torch.optim.SGD(alone.parameters(), lr=0.0), batch, beta=2.0, rho=0.3)
            assert_close(found[rank]["seen"][step][1], norms, 1e-5)
            grads = [param.grad for param in alone.parameters()]
            total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]  # type: ignore[operator]
        for param, value, grad in zip(model.parameters(), start, total or [], strict=True):
            assert torch.equal(param, value)
            param.grad = grad / 2  # type: ignore[operator]
        base.step()
    assert_close(found[0]["weights"], weights(model), 1e-5)
