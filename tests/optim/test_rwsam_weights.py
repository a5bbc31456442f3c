"""Weights of RW-SAM that count norms otherwise: against long gradients, in standard deviations, cut at a multiple of the median."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import RWSAM
from tests.optim.problem import twin, weights
from tests.optim.rwsam_problem import B, assert_close, losses_of, make_batch, make_model, written_out_step

SGD: dict[str, Any] = {"lr": 0.1, "rho": 0.2}


def standardised(norms: Tensor) -> Tensor:
    return (norms - norms.mean()) / norms.std(correction=0)


def cut(norms: Tensor) -> Tensor:
    return norms.clamp(max=1.1 * norms.median().item())


@pytest.mark.parametrize(
    ("options", "counted"),
    [
        ({"beta": -2.0}, lambda norms: norms),
        ({"beta": 1.5, "beta_scale": "std"}, standardised),
        ({"beta": -0.5, "beta_scale": "std", "micro_batch": 3}, standardised),
        ({"beta": 2.0, "norm_cap": 1.1}, cut),
        ({"beta": lambda t: -1.0 / t, "beta_scale": "std", "norm_cap": 1.1}, lambda norms: standardised(cut(norms))),
    ],
    ids=["against", "std", "std against, of threes", "cut", "all"],
)
def test_steps_are_the_formulas(options: dict[str, Any], counted: Any) -> None:
    model = make_model()
    other = twin(model)
    optimizer, base = RWSAM(model, torch.optim.SGD, **options, **SGD), torch.optim.SGD(other.parameters(), lr=0.1)
    for step in range(3):
        batch, beta = make_batch(seed=step), options["beta"]
        optimizer.step(lambda batch=batch: losses_of(model, batch))
        at = beta(step + 1) if callable(beta) else beta
        norms, p = written_out_step(other, base, batch, beta=at, m=options.get("micro_batch", 1), counted=counted, rho=0.2)
        assert_close(weights(model), weights(other), 1e-9)
        assert_close(optimizer.last_norms, norms)  # as they are
        assert_close(optimizer.last_weights, p)


def test_a_negative_beta_prefers_short_gradients() -> None:
    model, batch = make_model(), make_batch()
    optimizer = RWSAM(model, torch.optim.SGD, beta=-1e6, **SGD)
    optimizer.step(lambda: losses_of(model, batch))
    assert optimizer.last_norms is not None
    assert optimizer.last_weights is not None
    assert optimizer.last_weights[optimizer.last_norms.argmin()] == 1.0


def test_draws_follow_standardised_norms() -> None:
    model, batch = make_model(), make_batch()
    optimizer = RWSAM(model, torch.optim.SGD, beta=2.0, beta_scale="std", sampling="draw", draws=3, **SGD)
    optimizer.step(lambda: losses_of(model, batch))
    assert optimizer.last_norms is not None
    assert_close(optimizer.last_weights, (2.0 * standardised(optimizer.last_norms)).softmax(0))


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("cap", [None, 1.0])
def test_equal_norms_have_equal_weights(value: float, cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their deviation is 0, or that of their rounding."""
    model, batch = make_model(), make_batch()
    optimizer = RWSAM(model, torch.optim.SGD, beta=2.0, beta_scale="std", norm_cap=cap, **SGD)
    rounded = value * (1 + 1e-12 * torch.arange(B, dtype=torch.float64))
    with optimizer.recording():
        losses = losses_of(model, batch)
    monkeypatch.setattr(type(optimizer._engine), "__call__", lambda self, losses, **_: rounded)
    monkeypatch.setattr(type(optimizer._engine), "weighted_grads_", lambda self, weights: None)
    optimizer.weighted_backward(losses)
    assert optimizer.last_weights is not None
    assert_close(optimizer.last_weights, torch.full((B,), 1 / B, dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_not_capped(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pass along a random direction, whose loss may overflow where every gradient is finite."""
    model, batch = make_model(), make_batch()
    before = weights(model)
    optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, norm_cap=2.0, norms="finite_difference", **SGD)
    norms = torch.ones(B, dtype=torch.float64)
    norms[1] = bad
    monkeypatch.setattr(type(optimizer._directional), "norms", lambda self, slopes, losses: norms)
    optimizer.step(lambda: losses_of(model, batch))
    assert optimizer.skipped_steps == 1
    assert all(map(torch.equal, weights(model), before))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_skips_the_step(bad: float) -> None:
    model, (inputs, labels) = make_model(), make_batch()
    inputs = inputs.clone()
    inputs[1, 0] = bad
    before = weights(model)
    optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, beta_scale="std", norm_cap=2.0, **SGD)
    optimizer.step(lambda: losses_of(model, (inputs, labels)))
    assert optimizer.skipped_steps == 1
    assert all(map(torch.equal, weights(model), before))
