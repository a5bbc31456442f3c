"""RW-SAM's errors: each names the argument, what was expected and what came, and leaves the weights alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sam_kernels import RWSAM
from tests.optim.problem import assert_same_bits, weights
from tests.optim.rwsam_problem import losses_of, make_batch, make_model

NAN = float("nan")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"beta": float("-inf")}, ValueError, r"beta must be a finite number in \(-inf, inf\), got -inf"),
        ({"beta_scale": "sd"}, ValueError, "beta_scale must be one of 'none', 'std', got 'sd'"),
        ({"norm_cap": 0.0}, ValueError, "norm_cap must be a finite number"),
        ({"norm_cap": "2"}, TypeError, "norm_cap must be a number"),
        ({"beta": NAN}, ValueError, "beta must be a finite number"),
        ({"beta": float("inf")}, ValueError, "beta must be a finite number"),
        ({"beta": True}, TypeError, "beta must be a number, a tensor"),
        ({"beta": "1/t"}, TypeError, r"beta must be a number, a tensor or a callable t -> beta, got '1/t'"),
        ({"beta": lambda t: NAN * t}, ValueError, r"beta\(1\) must be a finite number"),
        ({"beta": torch.ones(2)}, TypeError, "beta must be a number"),
        ({"norms": "exakt"}, ValueError, "norms.*exact.*finite_difference.*jvp.*last_layer.*norm_layers.*exakt"),
        ({"norms": []}, ValueError, "norms is an empty list"),
        ({"norms": [nn.Linear(2, 2)]}, ValueError, r"norms\[0\] .* is no module of the model"),
        ({"norms": 3}, TypeError, "norms must be one of"),
        ({"micro_batch": 0}, ValueError, "micro_batch must be at least 1, got 0"),
        ({"micro_batch": 2.0}, TypeError, "micro_batch must be an integer"),
        ({"sampling": "drawn"}, ValueError, "sampling"),
        ({"draws": 0}, ValueError, "draws must be at least 1"),
        ({"replacement": 1}, TypeError, "replacement"),
        ({"delta": 0.0}, ValueError, "delta must be a finite number"),
        ({"delta": -1e-3}, ValueError, "delta must be a finite number"),
        ({"delta": NAN}, ValueError, "delta must be a finite number"),
        ({"delta_scaling": "d"}, ValueError, "delta_scaling"),
        ({"distribution": "uniform"}, ValueError, "distribution"),
        ({"num_directions": 0}, ValueError, "num_directions must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be an integer in"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
        ({"unsupported": "ignore"}, ValueError, "unsupported"),
        ({"rho": -0.1}, ValueError, "rho must be a finite number"),
        ({"params": []}, ValueError, "empty parameter list"),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RWSAM(make_model(), torch.optim.SGD, **{"beta": 1.0, "lr": 0.1, **arguments})


def test_a_model_is_needed() -> None:
    model = make_model()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        RWSAM(model.parameters(), torch.optim.SGD, beta=1.0, lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norms='norm_layers', and the model has no such layer"):
        RWSAM(nn.Linear(2, 2), torch.optim.SGD, beta=1.0, norms="norm_layers", lr=0.1)


@pytest.mark.parametrize("norms", ["exact", "finite_difference", "jvp"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda losses: losses.mean(), ValueError, r"losses of shape \(B,\), one for each sample, got \(\); use reduction='none'"),
        (lambda losses: losses[:, None], ValueError, r"losses of shape \(B,\)"),
        (lambda losses: losses[:0], ValueError, r"losses of shape \(B,\)"),
        (lambda losses: losses[:10], ValueError, "10 losses cannot be cut into micro-batches of 4"),
        (lambda losses: losses.mean().item(), TypeError, "must return the samples' losses"),
        (lambda losses: None, TypeError, "must return the samples' losses"),
        (lambda losses: losses.long(), TypeError, "must return the samples' losses, a floating-point tensor"),
    ],
)
def test_losses(norms: str, change: Any, error: type[Exception], message: str) -> None:
    model, batch = make_model(), make_batch()
    optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, norms=norms, micro_batch=4, lr=0.1)
    before = weights(model)
    with pytest.raises(error, match=message):
        optimizer.step(lambda: change(losses_of(model, batch)))
    assert_same_bits(weights(model), before)


def test_more_draws_than_samples() -> None:
    model, batch = make_model(), make_batch()
    optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, sampling="draw", draws=13, replacement=False, lr=0.1)
    with pytest.raises(ValueError, match="RWSAM: draws=13 without replacement, of 12"):
        optimizer.step(lambda: losses_of(model, batch))


def test_the_two_step_api_needs_one_forward_pass() -> None:
    model, batch = make_model(), make_batch()
    for norms in ("finite_difference", "jvp"):
        optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, norms=norms, lr=0.1)
        with pytest.raises(RuntimeError, match="calls a closure several times"), optimizer.recording():
            pass
    optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, lr=0.1)
    with pytest.raises(RuntimeError, match=r"under recording\(\) first"):
        optimizer.weighted_backward(losses_of(model, batch))
    with optimizer.recording():
        losses = losses_of(model, batch)
    optimizer.weighted_backward(losses)
    with pytest.raises(RuntimeError, match="once for each call"):
        optimizer.weighted_backward(losses)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="recording between first_step and second_step"), optimizer.recording():
        pass
    with pytest.raises(RuntimeError, match="weighted_backward between first_step and second_step"):
        optimizer.weighted_backward(losses)


@pytest.mark.parametrize("norms", ["exact", "finite_difference", "jvp"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_losses_without_a_graph(norms: str, beta: float) -> None:
    model, batch = make_model(), make_batch()
    optimizer = RWSAM(model, torch.optim.SGD, beta=beta, norms=norms, lr=0.1)
    with pytest.raises(RuntimeError, match="detached"):
        optimizer.step(lambda: losses_of(model, batch).detach())


def test_nothing_to_take_norms_of() -> None:
    model, batch = make_model(), make_batch()
    groups = [{"params": [*model[0].parameters(), *model[4].parameters()]}, {"params": model[1].parameters(), "rho": 0.0}]
    optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, norms="norm_layers", params=groups, lr=0.1)
    with pytest.raises(ValueError, match="norms='norm_layers': none of their parameters is trainable and in a group with rho > 0"):
        optimizer.step(lambda: losses_of(model, batch))
    with pytest.raises(ValueError, match=r"parameter param_groups\[0\]\['params'\]\[0\] is no parameter of the model"):
        RWSAM(model, torch.optim.SGD, beta=1.0, params=make_model().parameters(), lr=0.1)
    with pytest.raises(TypeError, match="compiled"):
        RWSAM(torch.compile(model), torch.optim.SGD, beta=1.0, lr=0.1)  # type: ignore[arg-type]


def test_arguments_of_step_that_sam_has() -> None:
    model = make_model()
    optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, lr=0.1)
    with pytest.raises(TypeError, match="ascent_closure"):
        optimizer.step(lambda: losses_of(model, make_batch()), ascent_closure=lambda: None)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="micro_batches needs batch"):
        optimizer.step(lambda: losses_of(model, make_batch()), micro_batches=2)
    with pytest.raises(TypeError, match="grad_scaler must be"):
        optimizer.step(lambda: losses_of(model, make_batch()), grad_scaler=3)  # type: ignore[arg-type]
