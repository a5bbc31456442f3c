"""Bounds on reshuffled data against enumeration: every permutation of small sums, one epoch and many."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import theory

pytestmark = pytest.mark.usefixtures("one_thread")
N, D = 6, 3
PERMUTATIONS = torch.tensor(list(itertools.permutations(range(N))))  # (720, N)
EXACT = {"mu": 2.0, "L": 3.0, "A": 0.5, "B": 0.5, "C": 5.0}


class Sum:
    """f_i(x) = (a_i'x - b_i)² / 2 + r ‖x‖² / 2, batches of tau samples: all constants in closed form."""

    def __init__(self, seed: int, tau: int, r: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.a = torch.randn(N, D, generator=generator, dtype=torch.float64) * torch.linspace(0.5, 2, N, dtype=torch.float64)[:, None]
        self.b, self.r, self.tau, self.batches = torch.randn(N, generator=generator, dtype=torch.float64), r, tau, N // tau
        hessian = self.a.T @ self.a / N + r * torch.eye(D, dtype=torch.float64)
        self.mu = torch.linalg.eigvalsh(hessian)[0].item()
        self.minimum = torch.linalg.solve(hessian, self.a.T @ self.b / N)
        self.f_inf = self.f(self.minimum).item()
        own = self.a.square().sum(1) + r
        self.L = theory.sampled_smoothness("tau_nice", n=N, L=own, tau=tau)
        self.A, self.B = theory.expected_residual("tau_nice", n=N, L=own, tau=tau)
        self.C = theory.residual_constant(self.A, self.f_inf, (r * self.b.square() / (2 * own)).mean().item())

    def constants(self, order: str, lambd: float) -> dict[str, Any]:
        """With the steps of theory. Whatever the batches, ‖∇f_S‖² ≤ 2 L (f_S - f_S,inf), and f_S,inf ≥ 0."""
        A, B, C = (self.A, self.B, self.C) if order == "random" else (self.L, 0.0, 2 * self.L * self.f_inf)
        rho, gamma = theory.reshuffling_steps(self.mu, self.L, A, B, lambd, self.batches, order)
        found = {"mu": self.mu, "L": self.L, "A": A, "B": B, "C": C, "lambd": lambd, "rho": rho, "gamma": gamma}
        return {**found, "batches": self.batches, "order": order}

    def f(self, x: Tensor) -> Tensor:  # (..., D) -> (...)
        return (x @ self.a.T - self.b).square().mean(-1) / 2 + self.r / 2 * x.square().sum(-1)

    def gradient(self, x: Tensor, rows: Tensor) -> Tensor:
        """(runs, D) at as many points, of batches (runs, tau)."""
        residuals = torch.einsum("rtd,rd->rt", self.a[rows], x) - self.b[rows]
        return torch.einsum("rtd,rt->rd", self.a[rows], residuals) / rows.shape[1] + self.r * x

    def epoch(self, x: Tensor, orders: Tensor, lambd: float, rho: float, gamma: float) -> tuple[Tensor, Tensor]:
        """Where runs (runs, D) end, and where their gradients were taken, (batches, runs, D)."""
        seen = []
        for rows in orders.split(self.tau, 1):
            g = self.gradient(x, rows)
            seen.append(x + rho * (1 - lambd + lambd / g.norm(dim=1, keepdim=True).clamp(min=1e-300)) * g)
            x = x - gamma * self.gradient(seen[-1], rows)
        return x, torch.stack(seen)


@dataclass(frozen=True)
class Short:
    """Which of the steps are shortened, and by how much: other terms decide then."""

    rho: float
    gamma: float


every_size = pytest.mark.parametrize("tau", [1, 2, 3, 6])
every_mix = pytest.mark.parametrize("lambd", [0.0, 0.5, 1.0])


@every_size
@every_mix
@pytest.mark.parametrize("order", ["random", "any"])
@pytest.mark.parametrize("short", [Short(1, 1), Short(0.1, 1), Short(1, 0.1), Short(0, 1)], ids=str)
def test_an_epoch_keeps_the_bound(tau: int, lambd: float, order: str, short: Short) -> None:
    """Expected over all permutations, or in each of them; from the minimum and from far away. One epoch's bound is that of all."""
    problem = Sum(1, tau)
    constants = problem.constants(order, lambd)
    constants["rho"] *= short.rho
    constants["gamma"] *= short.gamma
    for k, far in enumerate((0.0, 1e-3, 0.03, 0.3, 3.0, 30.0)):
        direction = torch.randn(D, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        x = problem.minimum + far * direction
        gap = max(0.0, problem.f(x).item() - problem.f_inf)
        ends, _ = problem.epoch(x.expand(len(PERMUTATIONS), D), PERMUTATIONS, lambd, constants["rho"], constants["gamma"])
        left = problem.f(ends) - problem.f_inf
        found = (left.mean() if order == "random" else left.max()).item()
        assert found <= theory.reshuffling_bound(1, gap, **constants) + 1e-15 * max(1.0, gap)


@every_size
@every_mix
@pytest.mark.parametrize("order", ["random", "any"])
def test_the_error_of_an_epoch_is_as_derived(tau: int, lambd: float, order: str) -> None:
    """The two steps of the proof before the last: the mean square distance, and the partial sums of gradients."""
    problem = Sum(2, tau)
    k, m = problem.constants(order, lambd), problem.batches
    rise, s = 1 + k["L"] * k["rho"] * (1 - lambd), math.sqrt(m * (m - 1) / 2)
    kappa = 1 / (1 - rise * k["L"] * k["gamma"] * s)
    for far in (1e-3, 0.1, 10.0):
        x = (problem.minimum + far * torch.ones(D, dtype=torch.float64)).expand(len(PERMUTATIONS), D)
        _, seen = problem.epoch(x, PERMUTATIONS, lambd, k["rho"], k["gamma"])
        own = torch.stack([problem.gradient(x, rows) for rows in PERMUTATIONS.split(tau, 1)])  # (m, permutations, D)
        partial = torch.cat([torch.zeros_like(own[:1]), own.cumsum(0)[:-1]]).square().sum(-1).mean(0)
        square, full = own.square().sum(-1).mean(0), own.mean(0).square().sum(-1)
        distance = (seen - x).square().sum(-1).mean(0)
        if order == "random":
            partial, square, full, distance = partial.mean(), square.mean(), full.mean(), distance.mean()
            w1, w2 = ((m - 1) * (2 * m - 1) / 6, (m + 1) / 6) if m > 1 else (0.0, 0.0)
            torch.testing.assert_close(partial, w1 * full + w2 * (square - full), rtol=1e-10, atol=1e-20)
        else:
            w1, w2 = (m - 1) * (2 * m - 1) / 3, (m * m - 1) / 3
            assert (partial <= (w1 * full + w2 * (square - full)) * (1 + 1e-12) + 1e-25).all()
        bound = (1 if m == 1 else 2) * kappa**2 * ((rise * k["gamma"]) ** 2 * partial + k["rho"] ** 2 * ((1 - lambd) * square + lambd))
        assert (distance <= bound * (1 + 1e-12)).all()
        residual = 2 * k["A"] * (problem.f(x[0]) - problem.f_inf) + k["B"] * full + k["C"]
        assert (square <= residual * (1 + 1e-12)).all()


@every_mix
@pytest.mark.parametrize("order", ["random", "any"])
def test_epochs_stay_below_the_bound(lambd: float, order: str) -> None:
    problem, epochs, generator = Sum(3, 2, r=0.5), 400, torch.Generator().manual_seed(0)
    constants = problem.constants(order, lambd)
    orders, x = PERMUTATIONS[::4], torch.zeros(len(PERMUTATIONS[::4]), D, dtype=torch.float64)  # "any": each run keeps its own
    gap = (problem.f(x[0]) - problem.f_inf).item()
    for epoch in range(1, epochs + 1):
        if order == "random":
            orders = PERMUTATIONS[torch.randint(len(PERMUTATIONS), (len(x),), generator=generator)]
        x, _ = problem.epoch(x, orders, lambd, constants["rho"], constants["gamma"])
        left = problem.f(x) - problem.f_inf
        assert (left.mean() if order == "random" else left.max()) <= theory.reshuffling_bound(epoch, gap, **constants)
    assert left.mean() < gap / 4


@pytest.mark.parametrize(("order", "noise"), [("random", 4 / 6), ("any", 8 / 3)])
def test_formulas_by_hand(order: str, noise: float) -> None:
    """Each term on its own. m = 3: s = √3, w₁ = 10/6 or 10/3, w₂ = 4/6 or 8/3."""
    few: dict[str, Any] = {**EXACT, "gamma": 0.01, "batches": 3, "order": order}
    ball = 9 / (1 - 0.03 * math.sqrt(3)) ** 2
    first = (10 / 6 if order == "random" else 10 / 3) - noise / 2
    theta = 1 - ball * 1e-4 * (first + noise * 0.25)
    assert theory.reshuffling_floor(lambd=0.5, rho=0.0, **few) == pytest.approx(ball * 1e-4 * noise * 5 / (4 * theta))
    shares = [theory.reshuffling_bound(k, 7.0, lambd=0.5, rho=0.0, **few) for k in (0, 1)]
    floor = theory.reshuffling_floor(lambd=0.5, rho=0.0, **few)
    assert shares == pytest.approx([7 + floor, 7 * (1 - 0.06 * theta) + floor])
    theta = 1 - 2 * ball * 1e-4 * (first + noise * 0.25)
    assert theory.reshuffling_floor(lambd=1.0, rho=0.1, **few) == pytest.approx(2 * ball * (1e-4 * noise * 5 + 0.01) / (4 * theta))
    rise = 1.15  # ν = 3 · 0.1 · 0.5
    ball = 18 / (1 - rise * 0.03 * math.sqrt(3)) ** 2
    a1, a2 = (rise * 0.01) ** 2 * first + 0.01 * 0.5 * 0.5, (rise * 0.01) ** 2 * noise + 0.01 * 0.5
    theta = 1 - ball * (a1 + a2 * 0.25)
    assert theory.reshuffling_floor(lambd=0.5, rho=0.1, **few) == pytest.approx(ball * (a2 * 5 + 0.01 * 0.5) / (4 * theta))


def test_one_batch_is_gradient_descent() -> None:
    whole: dict[str, Any] = {**EXACT, "A": 0.0, "B": 1.0, "C": 0.0, "rho": 0.1, "gamma": 1 / 3, "batches": 1}
    assert theory.reshuffling_floor(**whole, lambd=0.0) == 0
    assert theory.reshuffling_floor(**whole, lambd=1.0) == pytest.approx(9 * 0.01 / 4)  # L² ρ² / (2 μ)
    assert theory.reshuffling_bound(1, 1.0, **whole, lambd=1.0) == pytest.approx(1 - 2 / 3 + 9 * 0.01 / 4)
    assert theory.reshuffling_steps(2.0, 3.0, 0.0, 1.0, 1.0, 1) == pytest.approx((1 / 12, 1 / 3))


@every_mix
@pytest.mark.parametrize("order", ["random", "any"])
@pytest.mark.parametrize("batches", [1, 2, 10, 1000])
@pytest.mark.parametrize("mu", [1e-4, 0.1, 3.0])
def test_steps_leave_half_of_the_rate(lambd: float, order: str, batches: int, mu: float) -> None:
    for A, B in ((0.0, 1.0), (0.7, 0.9), (3.0, 0.0), (50.0, 1.0)):
        rho, gamma = theory.reshuffling_steps(mu, 3.0, A, B, lambd, batches, order)
        constants: dict[str, Any] = {"mu": mu, "L": 3.0, "A": A, "B": B, "lambd": lambd, "batches": batches, "order": order}
        floor = theory.reshuffling_floor(C=0.0, rho=rho, gamma=gamma, **constants)
        share = 1 + floor - theory.reshuffling_bound(1, 1.0, C=0.0, rho=rho, gamma=gamma, **constants)
        assert share >= gamma * batches * mu / 2 * (1 - 1e-9) - 1e-15 * (1 + floor)
        for less in (0.5, 0.01):  # smaller ones do as well
            assert theory.reshuffling_floor(C=1.0, rho=less * rho, gamma=less * gamma, **constants) <= theory.reshuffling_floor(
                C=1.0, rho=rho, gamma=gamma, **constants
            )


def test_the_floor_is_of_second_order() -> None:
    problem = Sum(4, 2)
    for lambd in (0.0, 0.5, 1.0):
        k = problem.constants("random", lambd)
        floors = [theory.reshuffling_floor(**{**k, "rho": k["rho"] / scale, "gamma": k["gamma"] / scale}) for scale in (1e3, 1e4)]
        assert floors[0] / floors[1] == pytest.approx(100, rel=0.01)


STEPS: dict[str, Any] = {**EXACT, "lambd": 0.5, "rho": 0.01, "gamma": 0.01, "batches": 3}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: theory.reshuffling_bound(-1, 1.0, **STEPS), ValueError, "reshuffling_bound: epochs must be at least 0, got -1"),
        (lambda: theory.reshuffling_bound(1, -1.0, **STEPS), ValueError, "reshuffling_bound: gap must be"),
        (lambda: theory.reshuffling_floor(**{**STEPS, "order": "once"}), ValueError, "order must be one of 'random', 'any', got 'once'"),
        (lambda: theory.reshuffling_floor(**{**STEPS, "batches": 0}), ValueError, "batches must be at least 1, got 0"),
        (lambda: theory.reshuffling_floor(**{**STEPS, "batches": 2.0}), TypeError, "batches must be an integer"),
        (lambda: theory.reshuffling_floor(**{**STEPS, "mu": 4.0}), ValueError, "mu must be at most L"),
        (lambda: theory.reshuffling_floor(**{**STEPS, "gamma": 0.12}), ValueError, r"L \* gamma \* batches must be at most 1, .* got 1.08"),
        (lambda: theory.reshuffling_floor(**{**STEPS, "gamma": 0.11, "rho": 5.0}), ValueError, "less than 1, got 0.99 and 4.858"),
        (lambda: theory.reshuffling_floor(**{**STEPS, "rho": 1.0}), ValueError, "theta must be more than 0, got .* rho = 1.0"),
        (lambda: theory.reshuffling_steps(4.0, 3.0, 1.0, 0.0, 0.5, 2), ValueError, "reshuffling_steps: mu must be at most L"),
        (lambda: theory.reshuffling_steps(1.0, 3.0, 1.0, 0.0, 1.5, 2), ValueError, "reshuffling_steps: lambd must be"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@every_mix
def test_the_mean_drift_of_an_epoch_is_that_of_a_longer_radius(lambd: float) -> None:
    """docs/reshuffling.md: ∇f + ρ E[H g ((1 - λ) + λ/‖g‖)] + (γ/2) E[H g] - (γ m/2) ∇²f ∇f, and no more than second order is left."""
    problem, x = Sum(5, 2), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    m, left = problem.batches, []
    rows = PERMUTATIONS[:, :2]
    g = problem.gradient(x.expand(len(rows), D), rows)
    curved = torch.einsum("rtd,rt->rd", problem.a[rows], torch.einsum("rtd,rd->rt", problem.a[rows], g)) / 2 + problem.r * g
    full = g.mean(0)
    hessian = problem.a.T @ problem.a / N + problem.r * torch.eye(D, dtype=torch.float64)
    for gamma in (1e-4, 5e-5):
        rho = 3 * gamma
        ends, _ = problem.epoch(x.expand(len(PERMUTATIONS), D), PERMUTATIONS, lambd, rho, gamma)
        radius = (curved * ((rho * (1 - lambd) + gamma / 2) + rho * lambd / g.norm(dim=1, keepdim=True))).mean(0)
        left.append(((x - ends.mean(0)) / (gamma * m) - full - radius + gamma * m / 2 * hessian @ full).norm().item())
    assert left[1] < 0.02 * radius.norm().item()
    assert left[0] / left[1] == pytest.approx(4, rel=0.02)
