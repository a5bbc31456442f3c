"""Steps against the formula written out with torch's own optimizers, in float64."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch

import sam_kernels
from tests.optim.problem import BACKENDS, closure_of, loss_of, make_batch, make_model, twin, weights, written_out_step

BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "sgd-nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "sgd-maximize": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.5, "maximize": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "adamw-amsgrad": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    "adam-decoupled": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("options", [{}, {"lambd": 0.0}, {"lambd": 0.3}, {"adaptive": True, "eta": 0.01, "lambd": 0.7}], ids=str)
def test_ten_steps_follow_the_formula(backend: str, base: str, options: dict[str, Any]) -> None:
    base_class, kwargs = BASES[base]
    if unknown := kwargs.keys() - inspect.signature(base_class).parameters.keys():  # torch 2.6 has no decoupled_weight_decay
        pytest.skip(f"{base_class.__name__} of torch {torch.__version__} has no {', '.join(unknown)}")
    model, batch = make_model(torch.float64), make_batch(torch.float64)
    expected_model = twin(model)
    expected_base = base_class(expected_model.parameters(), **kwargs)
    with sam_kernels.use_backend(backend):
        optimizer = sam_kernels.SAM(model.parameters(), base_class, rho=0.05, **options, **kwargs)
        for _ in range(10):
            first_loss = loss_of(model, batch).item()
            loss = optimizer.step(closure_of(optimizer, model, batch))
            assert loss.item() == first_loss
            written_out_step(expected_model, expected_base, batch, rho=0.05, **options)
            for got, expected in zip(weights(model), weights(expected_model), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("lambd", "rho", "values"),
    [
        ("1/t", 0.05, [(1.0, 0.05), (0.5, 0.05), (1 / 3, 0.05)]),
        ("1-1/t", 0.05, [(0.0, 0.05), (0.5, 0.05), (2 / 3, 0.05)]),
        (lambda t: 0.1 * t, lambda t: 0.2 / t, [(0.1, 0.2), (0.2, 0.1), (0.3, 0.2 / 3)]),
        (0.5, "0.1/k^0.5", [(0.5, 0.1), (0.5, 0.1 / math.sqrt(2)), (0.5, 0.1 / math.sqrt(3))]),
        (0.5, "1e-1 / k ^ .001", [(0.5, 0.1), (0.5, 0.1 / 2**0.001), (0.5, 0.1 / 3**0.001)]),
    ],
)
def test_schedules_start_at_one_on_the_first_step(lambd: Any, rho: Any, values: list[tuple[float, float]]) -> None:
    model, batch = make_model(torch.float64), make_batch(torch.float64)
    expected_model = twin(model)
    expected_base = torch.optim.SGD(expected_model.parameters(), lr=0.1)
    optimizer = sam_kernels.UnifiedSAM(model.parameters(), torch.optim.SGD, lambd=lambd, rho=rho, lr=0.1)
    for step_lambd, step_rho in values:
        optimizer.step(closure_of(optimizer, model, batch))
        written_out_step(expected_model, expected_base, batch, rho=step_rho, lambd=step_lambd)
        for got, expected in zip(weights(model), weights(expected_model), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_presets_are_sam_with_other_defaults() -> None:
    model = make_model()
    assert sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1).param_groups[0]["lambd"] == 1.0
    assert sam_kernels.USAM(model.parameters(), torch.optim.SGD, lr=0.1).param_groups[0]["lambd"] == 0.0
    assert sam_kernels.UnifiedSAM(model.parameters(), torch.optim.SGD, lr=0.1).param_groups[0]["lambd"] == 0.5


def test_two_step_api_equals_the_closure() -> None:
    model, batch = make_model(), make_batch()
    other = twin(model)
    by_closure = sam_kernels.SAM(model.parameters(), torch.optim.AdamW, lr=0.01)
    by_hand = sam_kernels.SAM(other.parameters(), torch.optim.AdamW, lr=0.01)
    for _ in range(5):
        by_closure.step(closure_of(by_closure, model, batch))
        loss_of(other, batch).backward()
        by_hand.first_step(zero_grad=True)
        loss_of(other, batch).backward()
        by_hand.second_step(zero_grad=True)
        assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other), strict=True))
        assert all(param.grad is None for param in other.parameters())


def test_base_instance_is_used_as_it_is() -> None:
    model, batch = make_model(), make_batch()
    base = torch.optim.Adam(model.parameters(), lr=0.02, eps=1e-4)
    optimizer = sam_kernels.SAM(model.parameters(), base)
    assert optimizer.base_optimizer is base
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    other = twin(model)
    other_base = torch.optim.Adam(other.parameters(), lr=0.02, eps=1e-4)
    optimizer.step(closure_of(optimizer, model, batch))
    written_out_step(other, other_base, batch, rho=0.05)
    for got, expected in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("base", [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.RMSprop, {"lr": 0.01})])
def test_m_sam_perturbs_each_micro_batch_by_its_own_gradient(base: Any) -> None:
    model = make_model(torch.float64)
    batches = [make_batch(torch.float64, seed) for seed in (1, 2, 3)]
    other = twin(model)
    other_base = base[0](other.parameters(), **base[1])
    optimizer = sam_kernels.SAM(model.parameters(), base[0], rho=0.1, **base[1])
    for _ in range(3):
        first_losses = [loss_of(model, batch).item() for batch in batches]
        loss = optimizer.step([closure_of(optimizer, model, batch) for batch in batches])
        assert loss.item() == pytest.approx(sum(first_losses) / 3, rel=1e-14)
        start, sums = weights(other), None
        for batch in batches:
            other.zero_grad()
            loss_of(other, batch).backward()
            grads = [param.grad for param in other.parameters()]
            norm = torch.sqrt(sum((g**2).sum() for g in grads))
            with torch.no_grad():
                for param, g in zip(other.parameters(), grads, strict=True):
                    param.add_(0.1 / norm * g)
            other.zero_grad()
            loss_of(other, batch).backward()
            grads = [param.grad.clone() for param in other.parameters()]
            sums = grads if sums is None else [s + g for s, g in zip(sums, grads, strict=True)]
            with torch.no_grad():
                for param, value in zip(other.parameters(), start, strict=True):
                    param.copy_(value)
        for param, total in zip(other.parameters(), sums, strict=True):
            param.grad = total / 3
        other_base.step()
        for got, expected in zip(weights(model), weights(other), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_one_micro_batch_is_sam() -> None:
    model, batch = make_model(), make_batch()
    other = twin(model)
    sam = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    m_sam = sam_kernels.SAM(other.parameters(), torch.optim.SGD, lr=0.1)
    sam.step(closure_of(sam, model, batch))
    m_sam.step([closure_of(m_sam, other, batch)])
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other), strict=True))


def test_groups_have_their_own_radius_mix_and_normalisation() -> None:
    model, batch = make_model(torch.float64), make_batch(torch.float64)
    first, second = list(model[0].parameters()), list(model[2].parameters())
    groups = [{"params": first, "rho": 0.1, "lambd": 0.25}, {"params": second, "adaptive": True, "eta": 0.01, "lr": 0.5}]
    optimizer = sam_kernels.SAM(groups, torch.optim.SGD, rho=0.05, lr=0.1)
    start = weights(model)
    loss_of(model, batch).backward()
    grads = [param.grad.clone() for param in model.parameters()]
    scaling = [torch.ones_like(w) if i < 2 else w.abs() + 0.01 for i, w in enumerate(start)]
    norm = torch.sqrt(sum(((t * g) ** 2).sum() for t, g in zip(scaling, grads, strict=True)))
    optimizer.first_step(zero_grad=True)
    for i, (got, w, t, g) in enumerate(zip(weights(model), start, scaling, grads, strict=True)):
        scale = 0.1 * (0.75 + 0.25 / norm) if i < 2 else 0.05 / norm
        torch.testing.assert_close(got, w + scale * t * t * g, rtol=1e-12, atol=1e-13)
    loss_of(model, batch).backward()
    descent = [param.grad.clone() for param in model.parameters()]
    optimizer.second_step()
    for i, (got, w, g) in enumerate(zip(weights(model), start, descent, strict=True)):
        torch.testing.assert_close(got, w - (0.1 if i < 2 else 0.5) * g, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("base", [(torch.optim.SGD, {"lr": 0.1}), (torch.optim.RMSprop, {"lr": 0.01})])
def test_max_grad_norm_clips_the_descent_gradient(base: Any) -> None:
    model, batch = make_model(torch.float64), make_batch(torch.float64)
    other = twin(model)
    built_in = sam_kernels.SAM(model.parameters(), base[0], max_grad_norm=0.05, **base[1])
    outside = sam_kernels.SAM(other.parameters(), base[0], **base[1])
    for _ in range(3):
        built_in.step(closure_of(built_in, model, batch))
        loss_of(other, batch).backward()
        outside.first_step(zero_grad=True)
        loss_of(other, batch).backward()
        assert torch.nn.utils.clip_grad_norm_(other.parameters(), 0.05) > 0.05
        outside.second_step(zero_grad=True)
        for got, expected in zip(weights(model), weights(other), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
