"""CR-SAM: where its three passes are, what they make of curvature, and what is refused. Its formula: test_family.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import CRSAM, SAM
from sam_kernels.optim import descents, directions
from tests.optim.family import BASES, MEMBERS
from tests.optim.problem import assert_same_bits, closure_of, every_backend, loss_of, make_batch, make_model, twin, weights

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}


def visited(optimizer: Any, model: nn.Module, bad_pass: int = 0) -> list[list[Tensor]]:
    """The weights of a step's passes; the gradient of pass ``bad_pass`` has a NaN."""
    found: list[list[Tensor]] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        found.append(weights(model))
        loss = loss_of(model, make_batch(next(model.parameters()).dtype))
        (loss * float("nan") if len(found) == bad_pass else loss).backward()
        return loss

    optimizer.step(closure)
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"lambd": 0.3, "adaptive": True}, {"direction": directions.VarianceSuppressed(0.5)}, {"direction": directions.Extragradient()}],
    ids=["SAM", "mixed, adaptive", "VaSSO", "extragradient"],
)
@every_backend
def test_the_third_pass_is_at_the_opposite_point(backend: str, options: dict[str, Any]) -> None:
    model, other = make_model(torch.float64), make_model(torch.float64)
    there = visited(SAM(other.parameters(), torch.optim.SGD, rho=0.2, **options, **SGD), other)[1]
    for start, plus, minus, wanted in zip(
        *visited(CRSAM(model.parameters(), torch.optim.SGD, rho=0.2, **options, **SGD), model), there, strict=True
    ):
        assert torch.equal(plus, wanted)
        # Rounded once, of numbers below 2: half a unit of 2^-52.
        torch.testing.assert_close(plus + minus, 2 * start, rtol=0, atol=2.0**-52)
        assert not torch.equal(plus, minus)


@pytest.mark.parametrize("has_masters", [False, True])
def test_points_of_16_bit_parameters_are_opposite_too(has_masters: bool) -> None:
    model = make_model(torch.bfloat16)
    start, plus, minus = visited(CRSAM(model.parameters(), torch.optim.SGD, rho=0.5, master_weights=has_masters, **SGD), model)
    for w, p, m in zip(start, plus, minus, strict=True):
        # The mean is w but for the rounding of w - e: half of 2^-7 of it.
        torch.testing.assert_close((p.float() + m.float()) / 2, w.float(), rtol=0, atol=m.abs().max().item() * 2.0**-8)
        assert not torch.equal(p, m)


def test_a_quadratic_function_has_no_change_of_curvature() -> None:
    """∇f(w ± e) = A (w ± e): the step is along A (w + (1 + 2 β) e), whatever γ is."""
    hessian = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    start, lr, rho, beta = torch.tensor([1.0, -2.0], dtype=torch.float64), 0.1, 0.3, 0.2
    w = nn.Parameter(start.clone())
    optimizer = CRSAM([w], torch.optim.SGD, lr=lr, rho=rho, gamma=5.0, beta=beta)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w @ hessian @ w / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    g = hessian @ start
    torch.testing.assert_close(w.detach(), start - lr * hessian @ (start + (1 + 2 * beta) * rho * g / g.norm()), rtol=1e-13, atol=0)


@every_backend
@pytest.mark.parametrize("base", ["sgd-momentum", "adamw"])
def test_groups_have_radii_and_decays_of_their_own(backend: str, base: str) -> None:
    """Five steps; the second group rests, and is stepped along its own three gradients."""
    model, member, (base_class, kwargs) = make_model(torch.float64), MEMBERS["CRSAM"], BASES[base]
    other = twin(model)

    def groups(net: Any, **resting: Any) -> list[dict[str, Any]]:
        return [{"params": list(net[0].parameters())}, {"params": list(net[2].parameters()), "weight_decay": 0.3, **resting}]

    expected = member.transcribe(other, base_class(groups(other), **kwargs), rho=[member.rho, member.rho, 0.0, 0.0])
    optimizer = member.make(groups(model, rho=0.0), base_class, **kwargs)
    for t in range(5):
        batch = make_batch(torch.float64, seed=t)
        optimizer.step(closure_of(optimizer, model, batch))
        expected.step(batch)
        for got, wanted in zip(weights(model), weights(other), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


@every_backend
@pytest.mark.parametrize("bad_pass", [1, 2, 3])
@pytest.mark.parametrize("base", ["sgd-momentum", "adamw", "rmsprop"])
def test_a_gradient_that_is_not_finite_skips_the_step(backend: str, base: str, bad_pass: int) -> None:
    model, (base_class, kwargs) = make_model(), BASES[base]
    optimizer = CRSAM(model.parameters(), base_class, **kwargs)
    visited(optimizer, model)
    before = weights(model)
    visited(optimizer, model, bad_pass)
    assert_same_bits(weights(model), before)
    assert optimizer.skipped_steps == 1
    visited(optimizer, model)
    assert optimizer.skipped_steps == 1


def test_an_exception_in_the_third_pass_restores_the_weights() -> None:
    model, calls = make_model(), []
    optimizer = CRSAM(model.parameters(), torch.optim.SGD, **SGD)
    before = weights(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        calls.append(None)
        if len(calls) == 3:
            raise MemoryError
        loss = loss_of(model, make_batch())
        loss.backward()
        return loss

    with pytest.raises(MemoryError):
        optimizer.step(closure)
    assert_same_bits(weights(model), before)
    assert optimizer.param_groups[0]["sam_step"] == 0
    visited(optimizer, model)


def test_memory_is_freed() -> None:
    model = make_model()
    optimizer = CRSAM(model.parameters(), torch.optim.SGD, **SGD)
    held: list[Tensor] = []  # somebody else's, so that they are copied

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, make_batch())
        loss.backward()
        held.extend(param.grad for param in model.parameters() if param.grad is not None)
        return loss

    optimizer.step(closure)
    numel = sum(param.numel() for param in model.parameters())
    kept = optimizer._kept_grads, optimizer._kept_at_ascent
    assert [sum(copy.numel() for copy in each._copies._copies.values()) for each in kept] == [numel, numel]
    assert not any(each._kept for each in kept)
    optimizer.release_buffers()
    assert not any(each._copies._copies for each in kept)


def test_what_has_no_meaning_is_refused_by_name() -> None:
    model, batch = make_model(), make_batch()
    with pytest.raises(ValueError, match="descent 'crsam' has a third pass, whose gradient direction 'centralized' would not rewrite"):
        CRSAM(model.parameters(), torch.optim.SGD, direction=directions.Centralized(), **SGD)
    with pytest.raises(ValueError, match="descent 'crsam' needs the gradient at the weights; direction 'momentum' takes none"):
        CRSAM(model.parameters(), torch.optim.SGD, direction=directions.Momentum(), **SGD)
    with pytest.raises(ValueError, match="freeze_unperturbed=True: descent 'crsam' steps along the gradients of the first pass too"):
        CRSAM(model.parameters(), torch.optim.SGD, freeze_unperturbed=True, **SGD)
    with pytest.raises(ValueError, match="capturable=True: the third pass of descent 'crsam' has not been tried in a graph"):
        CRSAM(model.parameters(), torch.optim.SGD, capturable=True, **SGD)
    optimizer, before = SAM(model.parameters(), torch.optim.SGD, descent=descents.Curvature(), **SGD), weights(model)
    closure = closure_of(optimizer, model, batch)
    with pytest.raises(ValueError, match=r"SAM\.backward: descent 'crsam' has a third pass; call step\(closure\)"):
        optimizer.backward(closure)
    with pytest.raises(RuntimeError, match=r"SAM\.first_step: SAM needs step\(closure\)"):
        optimizer.first_step()
    with pytest.raises(ValueError, match="descent 'crsam' is defined for one batch, not for 2 micro-batches"):
        optimizer.step([closure, closure])
    assert_same_bits(weights(model), before)
