"""Every member of the family against its formula, step by step, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sam_kernels
from tests.optim.family import BASES, MEMBERS, ONE_PASS
from tests.optim.problem import BACKENDS, closure_of, every_backend, loss_of, make_batch, make_model, twin, weights

CASES = [(name, base) for name, member in MEMBERS.items() for base in member.bases]
OPTIONS: list[dict[str, Any]] = [{}, {"lambd": 0.3}, {"adaptive": True, "eta": 0.01, "lambd": 0.7}]


def convolutional() -> nn.Module:
    """Parameters of one, two and four dimensions."""
    torch.manual_seed(4)
    layers = nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)
    return nn.Sequential(*layers).to(torch.float64)


def negated(model: nn.Module, batch: Any) -> torch.Tensor:
    return -loss_of(model, batch)


def follows(name: str, base: str, model: nn.Module, steps: int = 10, **options: Any) -> None:
    member, (base_class, kwargs) = MEMBERS[name], BASES[base]
    other = twin(model)
    theirs = {"lr": member.options["gamma_b"], "weight_decay": 0.1, **kwargs} if base.startswith("sps") else dict(kwargs)
    loss = loss_of
    if theirs.pop("maximize", False):  # maximising f is minimising -f
        loss = negated
    expected = member.transcribe(other, base_class(other.parameters(), **theirs), loss, **options)
    optimizer = member.make(model.parameters(), base_class, **options, **kwargs)
    for t in range(steps):
        batch = make_batch(torch.float64, seed=t)
        optimizer.step(closure_of(optimizer, model, batch))
        expected.step(batch)
        for got, wanted in zip(weights(model), weights(other), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13, msg=lambda text, t=t: f"step {t + 1}: {text}")  # type: ignore[misc]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("name", "base"), CASES)
@every_backend
def test_ten_steps_follow_the_formula(backend: str, name: str, base: str, options: dict[str, Any]) -> None:
    with sam_kernels.use_backend(backend):
        follows(name, base, make_model(torch.float64), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MEMBERS)
def test_convolutions_follow_the_formula(backend: str, name: str) -> None:
    with sam_kernels.use_backend(backend):
        follows(name, MEMBERS[name].bases[0], convolutional())


def test_every_named_optimizer_is_here() -> None:
    """Those of other files: RW-SAM, SASSHA, and those that are SAM with another value in a parameter group."""
    named = {member.name for member in MEMBERS.values()}
    assert named | {"RWSAM", "SASSHA", "USAM", "UnifiedSAM", "ASAM"} == set(sam_kernels.optim.__all__)


@pytest.mark.parametrize("name", MEMBERS)
def test_the_loss_returned_is_that_of_the_first_pass(name: str) -> None:
    member, model, batch = MEMBERS[name], make_model(torch.float64), make_batch(torch.float64)
    base_class, kwargs = BASES[member.bases[0]]
    optimizer = member.make(model.parameters(), base_class, **kwargs)
    calls = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        calls.append(loss.item())
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == calls[0]
    assert len(calls) == (1 if name in ONE_PASS else 3 if name == "CRSAM" else 2)


@pytest.mark.parametrize("base", ["sps", "sps-momentum"])
def test_the_step_size_that_was_found_is_told(base: str) -> None:
    member, model, batch = MEMBERS["SAMSPS"], make_model(torch.float64), make_batch(torch.float64)
    optimizer = member.make(model.parameters(), torch.optim.SGD, **BASES[base][1] | {"weight_decay": 0.0})
    assert optimizer.last_step_sizes == [None]
    before = weights(model)
    optimizer.step(closure_of(optimizer, model, batch))
    (found,) = optimizer.last_step_sizes
    grads = [param.grad for param in model.parameters()]
    scale = 1.0 if base == "sps-momentum" else found.item()  # with momentum .grad has become the step itself
    for start, now, grad in zip(before, weights(model), grads, strict=True):
        torch.testing.assert_close(start - now, scale * grad, rtol=1e-9, atol=1e-12)
    assert 0.0 < found.item() <= 0.85
