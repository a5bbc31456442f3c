"""Which members of the family are inexact gradient descent, as docs/schedules.md has it: x⁺ = x - t g with a bounded error g - ∇f(x).

SGD without momentum is the base. The error is read off the step: (x - x⁺)/t - ∇f(x).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import sam_kernels
from tests.test_convergence import EPS, LogSquares, iterates

pytestmark = pytest.mark.usefixtures("one_thread")
T, RHO, STEPS = 0.05, 0.3, 60
PROBLEM = LogSquares(6)
L = PROBLEM.L
SGD = torch.optim.SGD

# Absolute errors, by the factor of L ρ that bounds them.
ABSOLUTE: dict[str, tuple[Callable[..., Any], float]] = {
    "SAM": (lambda x, **o: sam_kernels.SAM(x, SGD, **o), 1.0),
    "VaSSO": (lambda x, **o: sam_kernels.VaSSO(x, SGD, **o), 1.0),
    "FriendlySAM": (lambda x, **o: sam_kernels.FriendlySAM(x, SGD, **o), 1.0),
    "RSAM": (lambda x, **o: sam_kernels.RSAM(x, SGD, **o), 1.0),
    "S2SAM": (lambda x, **o: sam_kernels.S2SAM(x, SGD, **o), 1.0),
    "GSAM": (lambda x, **o: sam_kernels.GSAM(x, SGD, alpha=0.4, **o), 1.4),
    "WSAM": (lambda x, **o: sam_kernels.WSAM(x, SGD, kappa=0.75, **o), 3.0),
    "WSAM, coupled": (lambda x, **o: sam_kernels.WSAM(x, SGD, kappa=0.75, decoupled=False, **o), 3.0),
}
RELATIVE: dict[str, Callable[..., Any]] = {
    "USAM": lambda x, **o: sam_kernels.USAM(x, SGD, **o),
    "Extragradient": lambda x, **o: sam_kernels.Extragradient(x, SGD, **o),
}


def errors(make: Callable[..., Any], rho: float) -> list[tuple[float, float]]:
    """‖(x - x⁺)/t - ∇f(x)‖ and ‖∇f(x)‖ of every step, from far and from near the minimum."""
    found = []
    for scale in (0.02, 3.0):
        start: Tensor = PROBLEM.minimum + scale * torch.randn(PROBLEM.dim, dtype=torch.float64)
        for x, after in pairwise(iterates(PROBLEM, start, STEPS, make, rho=rho, lr=T)):
            gradient = PROBLEM.gradient(x)
            found.append((((x - after) / T - gradient).norm().item(), gradient.norm().item()))
    return found


@pytest.mark.parametrize("name", ABSOLUTE)
def test_members_with_an_absolute_error(name: str) -> None:
    """Of at most a multiple of L ρ. It does not fade where the gradient does: near the minimum it is no relative one."""
    make, factor = ABSOLUTE[name]
    found = errors(make, RHO)
    assert all(error <= factor * L * RHO * (1 + 100 * EPS) + 100 * EPS / T for error, _ in found)
    assert max(error / gradient for error, gradient in found) > 1.5


@pytest.mark.parametrize("name", RELATIVE)
def test_members_with_a_relative_error(name: str) -> None:
    """Of at most ν ‖∇f(x)‖, ν = L ρ, however short the gradient is."""
    found = errors(RELATIVE[name], RHO)
    assert all(error <= L * RHO * gradient * (1 + 100 * EPS) + 100 * EPS / T for error, gradient in found)
    assert max(error for error, _ in found) > 0.1 * L * RHO


def test_unified_sam_has_both_errors() -> None:
    lambd = 0.3
    found = errors(lambda x, **o: sam_kernels.UnifiedSAM(x, SGD, lambd=lambd, **o), RHO)
    assert all(error <= L * RHO * (lambd + (1 - lambd) * gradient) * (1 + 100 * EPS) + 100 * EPS / T for error, gradient in found)


def test_members_that_are_neither() -> None:
    """LookSAM's steps between, and steps with momentum, are further from ∇f than the radius explains, and than the gradient is long."""
    for make in (
        lambda x, **o: sam_kernels.LookSAM(x, SGD, k=5, alpha=2.0, **o),
        lambda x, **o: sam_kernels.SAM(x, SGD, momentum=0.9, **o),
    ):
        found = errors(make, 1e-3)
        assert max(error for error, _ in found) > 10 * L * 1e-3
        assert max(error / gradient for error, gradient in found) > 1


def test_m_sam_has_the_mean_error_of_its_micro_batches() -> None:
    """f = (f_1 + f_2)/2, each perturbed by its own gradient: ‖g - ∇f‖ ≤ (L_1 + L_2) ρ/2, whatever the gradients are."""
    a = torch.tensor([[1.0, 2.0], [-0.5, 1.0]], dtype=torch.float64)
    b = torch.tensor([1.0, -1.0], dtype=torch.float64)
    smoothness = a.square().sum(1)
    x = torch.nn.Parameter(torch.tensor([3.0, -1.0], dtype=torch.float64))
    optimizer = sam_kernels.SAM([x], SGD, lr=T, rho=RHO)

    def closure(i: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            optimizer.zero_grad()
            loss = (a[i] @ x - b[i]).square() / 2
            loss.backward()
            return loss

        return run

    for _ in range(40):
        before = x.detach().clone()
        gradient = a.T @ (a @ before - b) / 2
        optimizer.step([closure(0), closure(1)])
        error = ((before - x.detach()) / T - gradient).norm()
        assert 0.1 * smoothness.mean() * RHO < error <= smoothness.mean() * RHO * (1 + 100 * EPS) + 100 * EPS / T
