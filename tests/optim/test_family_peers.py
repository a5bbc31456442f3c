"""The members that ``pytorch_optimizer`` has too, with its conventions set equal; where it computes something else, what that is.

Its closures: FriendlySAM and LookSAM want the first gradients computed before ``step``, WSAM and GSAM call the closure twice.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sam_kernels
from tests.optim.problem import closure_of, loss_of, make_batch, make_model, twin, weights

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAMW: dict[str, Any] = {"lr": 0.01}
both_bases = pytest.mark.parametrize(("base", "kwargs"), [(torch.optim.SGD, SGD), (torch.optim.AdamW, ADAMW)], ids=["sgd", "adamw"])
STEPS = 8


@pytest.fixture
def peers() -> Any:
    return pytest.importorskip("pytorch_optimizer")


def run_alike(ours: Any, model: Any, theirs: Any, other: Any, *, first_gradients_before: bool) -> None:
    for k in range(STEPS):
        batch = make_batch(seed=k)
        ours.step(closure_of(ours, model, batch))
        closure = closure_of(theirs, other, batch)
        if first_gradients_before:
            closure()
        theirs.step(closure)


def alike(model: Any, other: Any) -> None:
    """float32 in another order of roundings: each of STEPS steps adds a few units of 2^-24 relative to what it adds up (weights and
    gradients below 4 here), and 8 steps with momentum 0.9 add up to less than 8 · 10 of those."""
    for got, wanted in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=80 * 4 * 2.0**-24)


def differ(model: Any, other: Any) -> None:
    """By more than roundings: ten times the tolerance above."""
    assert max((a - b).abs().max().item() for a, b in zip(weights(model), weights(other), strict=True)) > 10 * 80 * 4 * 2.0**-24


@both_bases
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("sigma", "lmbda"), [(1.0, 0.6), (0.5, 0.9)])
def test_friendly_sam(peers: Any, base: Any, kwargs: dict[str, Any], adaptive: bool, sigma: float, lmbda: float) -> None:
    """The same formula, the same order: the old average is subtracted, then updated; d = g on the first step. Its default lmbda is 0.9,
    ours 0.6, which is that of the authors' code."""
    model = make_model()
    other = twin(model)
    options = {"rho": 0.1, "sigma": sigma, "lmbda": lmbda, "adaptive": adaptive}
    ours = sam_kernels.FriendlySAM(model.parameters(), base, **options, **kwargs)
    theirs = peers.FriendlySAM(other.parameters(), base, **options, **kwargs)
    run_alike(ours, model, theirs, other, first_gradients_before=True)
    alike(model, other)


@both_bases
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("kappa", [0.9, 0.3])
def test_wsam(peers: Any, base: Any, kwargs: dict[str, Any], decoupled: bool, kappa: float) -> None:
    """The same formula; kappa is called gamma there."""
    model = make_model()
    other = twin(model)
    ours = sam_kernels.WSAM(model.parameters(), base, rho=0.1, kappa=kappa, decoupled=decoupled, **kwargs)
    theirs = peers.WSAM(other, other.parameters(), base, rho=0.1, gamma=kappa, decouple=decoupled, max_norm=None, **kwargs)
    run_alike(ours, model, theirs, other, first_gradients_before=False)
    alike(model, other)


@both_bases
@pytest.mark.parametrize("alpha", [0.4, 0.05])
def test_gsam(peers: Any, base: Any, kwargs: dict[str, Any], alpha: float) -> None:
    """The same formula, with 1e-12 added in three denominators. The radius is its scheduler's; a constant one here."""
    model = make_model()
    other = twin(model)

    class Constant:
        def step(self) -> float:
            return 0.1

    ours = sam_kernels.GSAM(model.parameters(), base, rho=0.1, alpha=alpha, **kwargs)
    inner = base(other.parameters(), **kwargs)
    theirs = peers.GSAM(other.parameters(), inner, other, Constant(), alpha)
    for k in range(STEPS):
        batch = make_batch(seed=k)
        ours.step(closure_of(ours, model, batch))

        def get_grad(batch: Any = batch) -> tuple[None, Tensor]:
            inner.zero_grad()
            with torch.enable_grad():
                loss = loss_of(other, batch)
            loss.backward()
            return None, loss.detach()

        theirs.step(get_grad)
    alike(model, other)


@both_bases
def test_looksam_with_one_parameter(peers: Any, base: Any, kwargs: dict[str, Any]) -> None:
    """The same formula where there is one tensor; the next test has more. Its default k is 10, ours 5."""
    torch.manual_seed(3)
    model = torch.nn.Linear(6, 2, bias=False)
    other = twin(model)
    options = {"rho": 0.1, "k": 3, "alpha": 0.4}
    ours = sam_kernels.LookSAM(model.parameters(), base, **options, **kwargs)
    theirs = peers.LookSAM(other.parameters(), base, **options, **kwargs)
    run_alike(ours, model, theirs, other, first_gradients_before=True)
    alike(model, other)


class LookSAMByParameter:
    """LookSAM with projection and norms of each parameter on its own, in place of those of the whole gradient."""

    def __init__(self, model: Any, base: Any, *, rho: float, k: int, alpha: float) -> None:
        self.model, self.base, self.rho, self.k, self.alpha, self.t = model, base, rho, k, alpha, 0
        self.kept: list[Tensor] = []

    def gradients(self, batch: Any) -> list[Tensor]:
        self.model.zero_grad()
        loss_of(self.model, batch).backward()
        return [param.grad.clone() for param in self.model.parameters()]

    def step(self, batch: Any) -> None:
        params, g = list(self.model.parameters()), self.gradients(batch)
        if self.t % self.k == 0:
            start, norm = weights(self.model), torch.stack([each.norm() for each in g]).norm()
            with torch.no_grad():
                for param, each in zip(params, g, strict=True):
                    param.add_(each, alpha=self.rho / (norm.item() + 1e-12))
            g_s = self.gradients(batch)
            with torch.no_grad():
                for param, value in zip(params, start, strict=True):
                    param.copy_(value)
            self.kept = [s - (s * each).sum() / each.square().sum() * each for s, each in zip(g_s, g, strict=True)]
        else:
            for param, each, v in zip(params, g, self.kept, strict=True):
                param.grad = each + self.alpha * each.norm() / v.norm() * v
        self.base.step()
        self.t += 1


def test_looksam_of_several_parameters_is_another_one_there(peers: Any) -> None:
    """The paper's g_v, ĝ and norms are of the gradient, all parameters together, and so are ours. Theirs are of each tensor: the formula
    above is what it computes."""
    model = make_model()
    other, third = twin(model), twin(model)
    options: dict[str, Any] = {"rho": 0.1, "k": 3, "alpha": 0.4}
    ours = sam_kernels.LookSAM(model.parameters(), torch.optim.SGD, **options, **SGD)
    theirs = peers.LookSAM(other.parameters(), torch.optim.SGD, **options, **SGD)
    run_alike(ours, model, theirs, other, first_gradients_before=True)
    by_parameter = LookSAMByParameter(third, torch.optim.SGD(third.parameters(), **SGD), **options)
    for k in range(STEPS):
        by_parameter.step(make_batch(seed=k))
    alike(third, other)
    differ(model, other)
