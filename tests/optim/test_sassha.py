"""SASSHA against its formula, written out in float64; its options, state, skipped steps, and what it refuses by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels import SASSHA, functional
from sam_kernels.optim import descents, directions
from sam_kernels.optim._seeds import derived_seed
from tests.optim.problem import assert_same_bits, loss_of, make_batch, make_model, set_weights, twin, weights

SEED = 11
OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 0.1, "rho": 0.2, "hessian_every": 2, "num_samples": 3, "seed": SEED}


def closure_of(model: nn.Module, seed: int) -> Callable[[], Tensor]:
    return lambda: loss_of(model, make_batch(next(model.parameters()).dtype, seed=seed))


class Formula:
    """``rho``, ``weight_decay``: one for each parameter. Hessians are differentiated row by row."""

    def __init__(self, model: nn.Module, *, rho: list[float], weight_decay: list[float]) -> None:
        self.model, self.rho, self.weight_decay, self.t = model, rho, weight_decay, 0
        self.m, self.d = ([torch.zeros_like(param) for param in model.parameters()] for _ in range(2))

    def step(self, seed: int) -> None:
        self.t += 1
        (beta1, beta2), start = OPTIONS["betas"], weights(self.model)
        g = self.gradient(seed)
        norm = sum(each.square().sum() for each, rho in zip(g, self.rho, strict=True) if rho).sqrt()  # type: ignore[union-attr]
        set_weights(self.model, [w + rho * each / (norm + 1e-12) for w, rho, each in zip(start, self.rho, g, strict=True)])
        g_p = self.gradient(seed)
        if (self.t - 1) % OPTIONS["hessian_every"] == 0:
            self.s = self.t
            self.d = [beta2 * d + (1 - beta2) * h.abs() for d, h in zip(self.d, self.diagonal(seed), strict=True)]
        self.m = [beta1 * m + (1 - beta1) * each for m, each in zip(self.m, g_p, strict=True)]
        found = []
        for w, m, d, decay in zip(start, self.m, self.d, self.weight_decay, strict=True):
            scale = (d / (1 - beta2**self.s)).sqrt() + OPTIONS["eps"]
            found.append((1 - OPTIONS["lr"] * decay) * w - OPTIONS["lr"] * m / (1 - beta1**self.t) / scale)
        set_weights(self.model, found)

    def gradient(self, seed: int) -> list[Tensor]:
        return list(torch.autograd.grad(closure_of(self.model, seed)(), list(self.model.parameters())))

    def diagonal(self, seed: int) -> list[Tensor]:
        """mean z * H z, with the whole Hessian."""
        params = list(self.model.parameters())
        grads = torch.cat([g.flatten() for g in torch.autograd.grad(closure_of(self.model, seed)(), params, create_graph=True)])
        rows = [torch.autograd.grad(each, params, retain_graph=True, allow_unused=True, materialize_grads=True) for each in grads]
        hessian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        total = torch.zeros(len(hessian), dtype=torch.float64)
        for k in range(OPTIONS["num_samples"]):
            z = torch.zeros(len(hessian), dtype=torch.float32)
            views = [part.view(param.shape) for part, param in zip(z.split([param.numel() for param in params]), params, strict=True)]
            seed_of_z = derived_seed(SEED, self.t, k)
            functional.random_perturb_(
                views, [torch.zeros_like(each) for each in views], seed=seed_of_z, scale=1.0, distribution="rademacher", from_old=True
            )
            assert (z.abs() == 1).all()
            total += z.double() * (hessian @ z.double())
        parts = (total / OPTIONS["num_samples"]).split([param.numel() for param in params])
        return [part.view(param.shape) for part, param in zip(parts, params, strict=True)]


def groups_of(model: Any) -> list[dict[str, Any]]:
    return [
        {"params": list(model[0].parameters()), "weight_decay": 0.1},
        {"params": list(model[2].parameters()), "weight_decay": 0.3, "rho": 0.0},
    ]


@pytest.mark.parametrize("rests", [False, True])
def test_five_steps_follow_the_formula(rests: bool) -> None:
    """Two groups with decays of their own; the second rests, or nothing does.

    An element of h is a sum of products, below 1e-15 wrong. Its root may be √1e-15 wrong where it is 0, and a step lr m / eps² times as
    much, with m below 0.5: 8e-8 in a step, in five 4e-7. Averages do not have that in the first step.
    """
    model, rho = make_model(torch.float64), OPTIONS["rho"]
    other = twin(model)
    groups = groups_of(model)
    if not rests:
        del groups[1]["rho"]
    optimizer = SASSHA(groups, **OPTIONS)
    expected = Formula(other, rho=[rho, rho, 0.0, 0.0] if rests else [rho] * 4, weight_decay=[0.1, 0.1, 0.3, 0.3])
    for t in range(5):
        loss = closure_of(model, t)().item()
        assert optimizer.step(closure_of(model, t)).item() == loss
        expected.step(t)
        if t == 0:
            for state, m, d in zip(optimizer.state.values(), expected.m, expected.d, strict=True):
                torch.testing.assert_close(state["exp_avg"], m, rtol=1e-12, atol=1e-13)
                torch.testing.assert_close(state["exp_hessian"], d, rtol=1e-12, atol=1e-13)
        for got, wanted in zip(weights(model), weights(other), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=4e-7, msg=lambda text, t=t: f"step {t + 1}: {text}")  # type: ignore[misc]


@pytest.mark.parametrize("every", [1, 3])
def test_the_closure_is_called_twice_and_differentiated_again_when_it_is_due(every: int) -> None:
    model, calls, again = make_model(), list[Any](), list[int]()
    optimizer = SASSHA(model.parameters(), hessian_every=every)
    for t in range(6):
        before = optimizer.state[model[0].weight].get("exp_hessian", torch.zeros(())).clone()

        def closure(t: int = t) -> Tensor:
            calls.append(t)
            return closure_of(model, t)()

        optimizer.step(closure)
        if not torch.equal(before, optimizer.state[model[0].weight]["exp_hessian"]):
            again.append(t)
    assert calls == sorted([*range(6), *range(6)])
    assert again == list(range(0, 6, every))


def test_without_a_radius_the_hessian_is_the_one_at_the_weights() -> None:
    """f = ½ Σ a w²: D = |a| whatever z is, so a step is lr a w / (√|a| + eps) at first."""
    a, start = torch.tensor([2.0, -0.5, 1.0], dtype=torch.float64), torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    w = nn.Parameter(start.clone())
    optimizer = SASSHA([w], lr=0.1, rho=0.0, eps=0.01)
    assert optimizer.step(lambda: (a * w * w).sum() / 2).item() == (a * start * start).sum().item() / 2
    torch.testing.assert_close(w.detach(), start - 0.1 * a * start / (a.abs().sqrt() + 0.01), rtol=1e-13, atol=0)


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit() -> None:
    model = make_model()
    optimizer = SASSHA(groups_of(model), **OPTIONS)
    for t in range(3):
        optimizer.step(closure_of(model, t))
    other, saved = twin(model), copy.deepcopy(optimizer.state_dict())
    loaded = SASSHA(groups_of(other), **OPTIONS)
    loaded.load_state_dict(saved)
    for t in range(3, 7):
        optimizer.step(closure_of(model, t))
        loaded.step(closure_of(other, t))
    assert_same_bits(weights(other), weights(model))
    with pytest.raises(ValueError, match="HessianScaled"):
        sam_kernels.SAM(make_model().parameters(), torch.optim.SGD, lr=0.1).load_state_dict(saved)


@pytest.mark.parametrize("bad", ["first pass", "second pass", "second derivative"])
@pytest.mark.parametrize("due", [True, False])
def test_a_step_with_what_is_not_finite_is_skipped(bad: str, due: bool) -> None:
    model, calls = make_model(), list[None]()
    optimizer = SASSHA(model.parameters(), **{**OPTIONS, "hessian_every": 2})
    for t in range(2 if due else 1):
        optimizer.step(closure_of(model, t))
    before, state = weights(model), copy.deepcopy([*optimizer.state.values()])

    def closure() -> Tensor:
        calls.append(None)
        loss = closure_of(model, 7)()
        if bad == "second derivative":  # of |x|^1.5 at 0
            zero = model[0].weight.sum() - model[0].weight.sum().detach()
            return loss + zero.abs().pow(1.5)
        return loss * float("nan") if len(calls) == ("first pass", "second pass").index(bad) + 1 else loss

    optimizer.step(closure)
    is_skipped = due or bad != "second derivative"
    assert optimizer.skipped_steps == int(is_skipped)
    if is_skipped:
        assert_same_bits(weights(model), before)
        for got, wanted in zip(optimizer.state.values(), state, strict=True):
            assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    optimizer.step(closure_of(model, 8))
    assert all(param.isfinite().all() for param in weights(model))
    assert optimizer.skipped_steps == int(is_skipped)


def test_a_first_estimate_that_was_skipped_is_made_in_the_next_step() -> None:
    model = make_model()
    optimizer = SASSHA(model.parameters(), hessian_every=10)
    before = weights(model)
    optimizer.step(lambda: closure_of(model, 0)() * float("inf"))
    assert_same_bits(weights(model), before)
    optimizer.step(closure_of(model, 1))
    assert not torch.equal(weights(model)[0], before[0])


def test_normalisation_statistics_are_those_of_the_first_pass() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 2))
    optimizer = SASSHA(model.parameters(), model=model, hessian_every=2)
    for t in range(3):
        optimizer.step(closure_of(model, t))
        assert int(model[1].num_batches_tracked) == t + 1


def test_directions_and_clipping_go_with_it() -> None:
    model = make_model(torch.float64)
    optimizer = SASSHA(model.parameters(), direction=directions.VarianceSuppressed(0.5), lambd=0.5, max_grad_norm=1e-3, betas=(0.0, 0.9))
    optimizer.step(closure_of(model, 0))
    first = [state["exp_avg"] for state in optimizer.state.values()]
    norm = sum(each.square().sum() for each in first).sqrt()  # type: ignore[union-attr]
    torch.testing.assert_close(norm, torch.tensor(1e-3, dtype=torch.float64), rtol=1e-2, atol=0)  # torch's clipping adds 1e-6


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hessian_every": 0}, ValueError, "SASSHA: hessian_every"),
        ({"num_samples": 1.5}, TypeError, "SASSHA: num_samples"),
        ({"seed": -1}, ValueError, "SASSHA: seed"),
        ({"lr": -1.0}, ValueError, "SASSHA: lr"),
        ({"betas": (0.9, 1.0)}, ValueError, r"SASSHA: betas\[1\]"),
        ({"betas": 0.9}, TypeError, "SASSHA: betas must be two numbers"),
        ({"eps": "small"}, TypeError, "SASSHA: eps"),
        ({"descent": descents.Look()}, ValueError, "SASSHA: descent is not supported"),
        ({"capturable": True}, ValueError, "SASSHA: capturable is not supported"),
        ({"master_weights": True}, ValueError, "SASSHA: master_weights is not supported"),
        ({"stochastic_rounding": True}, ValueError, "SASSHA: stochastic_rounding is not supported"),
        ({"process_group": object()}, ValueError, "SASSHA: process_group is not supported"),
        ({"local_ascent": True}, ValueError, "SASSHA: local_ascent is not supported"),
    ],
)
def test_options_that_are_none_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SASSHA(make_model().parameters(), **options)


def test_parameters_of_16_bits_are_refused() -> None:
    with pytest.raises(TypeError, match=r"SASSHA: param_groups\[0\]\['params'\]\[0\] is of torch\.bfloat16"):
        SASSHA(make_model(torch.bfloat16).parameters())


def test_calls_that_it_has_not_are_refused_and_change_nothing() -> None:
    model = make_model()
    optimizer, before = SASSHA(model.parameters()), weights(model)
    closure = closure_of(model, 0)
    with pytest.raises(TypeError, match=r"SASSHA\.step: closure must be a callable"):
        optimizer.step(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"SASSHA\.step: grad_scaler is not supported"):
        optimizer.step(closure, grad_scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(TypeError, match="micro_batches"):
        optimizer.step(closure, micro_batches=2)  # type: ignore[call-arg]
    with pytest.raises(RuntimeError, match=r"SASSHA\.first_step"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"SASSHA\.backward"):
        optimizer.backward(closure)
    with pytest.raises(RuntimeError, match="without a graph"):
        optimizer.step(lambda: closure().detach())
    with pytest.raises(TypeError, match="closure must return the loss"):
        optimizer.step(lambda: 1.0)  # type: ignore[arg-type, return-value]
    closure().backward()
    with pytest.raises(RuntimeError, match="HessianScaled"):
        optimizer.base_optimizer.step()
    assert_same_bits(weights(model), before)


def test_an_operation_without_a_second_derivative_is_named() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    model = make_model()
    optimizer, before = SASSHA(model.parameters()), weights(model)
    with pytest.raises(RuntimeError, match=r"SASSHA: the backward pass of OnceBackward"):
        optimizer.step(lambda: Once.apply(closure_of(model, 0)()))
    assert_same_bits(weights(model), before)
    assert optimizer.param_groups[0]["sam_step"] == 0
