"""The theory against enumeration: every draw there is, on small problems whose constants are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import theory

pytestmark = pytest.mark.usefixtures("one_thread")
N, D = 5, 3
P = torch.tensor([0.3, 0.1, 0.2, 0.25, 0.15], dtype=torch.float64)
OWN = torch.tensor([0.3, 0.9, 0.5, 1.0, 0.2], dtype=torch.float64)  # each sample's own, of independent sampling
SAMPLINGS: list[tuple[str, dict[str, Any]]] = [
    ("tau_nice", {"tau": 1}),
    ("tau_nice", {"tau": 2}),
    ("tau_nice", {"tau": 5}),
    ("full", {}),
    ("single", {"probabilities": P}),
    ("uniform", {}),
    ("importance", {}),
    ("with_replacement", {"tau": 2}),
    ("with_replacement", {"tau": 3, "probabilities": P}),
    ("independent", {"probabilities": OWN}),
]
every_sampling = pytest.mark.parametrize(("name", "options"), SAMPLINGS, ids=lambda x: x if isinstance(x, str) else "-".join(x))


class Ridge:
    """f_i(x) = (a_i'x - b_i)² / 2 + r ‖x‖² / 2: everything that the theory asks for in closed form."""

    def __init__(self, seed: int, r: float = 0.1, n: int = N, d: int = D) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.a = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.linspace(0.5, 2, n, dtype=torch.float64)[:, None]
        self.b, self.r = torch.randn(n, generator=generator, dtype=torch.float64), r
        self.L = self.a.square().sum(1) + r
        hessian = self.a.T @ self.a / n + r * torch.eye(d, dtype=torch.float64)
        self.mu = torch.linalg.eigvalsh(hessian)[0].item()
        self.minimum = torch.linalg.solve(hessian, self.a.T @ self.b / n)
        self.f_inf = self.f(self.minimum).item()
        self.mean_f_i_inf = (r * self.b.square() / (2 * self.L)).mean().item()

    def f(self, x: Tensor) -> Tensor:  # (..., d) -> (...)
        return (x @ self.a.T - self.b).square().mean(-1) / 2 + self.r / 2 * x.square().sum(-1)

    def gradients(self, x: Tensor) -> Tensor:  # (d,) -> (n, d)
        return (self.a @ x - self.b)[:, None] * self.a + self.r * x


def draws(name: str, options: dict[str, Any], L: Tensor) -> Iterator[tuple[float, Tensor]]:
    """(probability, w) of every draw there is: its gradient is the sum of w_i ∇f_i."""
    n = len(L)
    one, tau = torch.eye(n, dtype=torch.float64), options.get("tau", 1)
    p = options.get("probabilities", L / L.sum() if name == "importance" else torch.full((n,), 1 / n, dtype=torch.float64))
    if name == "full":
        yield 1.0, torch.full((n,), 1 / n, dtype=torch.float64)
    elif name == "tau_nice":
        subsets = list(itertools.combinations(range(n), tau))
        yield from ((1 / len(subsets), one[list(subset)].mean(0)) for subset in subsets)
    elif name == "independent":
        for mask in itertools.product((0, 1), repeat=n):
            drawn = torch.tensor(mask, dtype=torch.float64)
            yield torch.where(drawn > 0, p, 1 - p).prod().item(), drawn / (n * p)
    else:
        for picks in itertools.product(range(n), repeat=tau):
            yield p[list(picks)].prod().item(), (one[list(picks)] / (n * p)).mean(0)


def points(problem: Ridge, count: int = 20) -> Tensor:
    """Near the minimum and far from it."""
    scales = torch.logspace(-2, 1, count, dtype=torch.float64)[:, None]
    return problem.minimum + scales * torch.randn(count, problem.a.shape[1], dtype=torch.float64)


@every_sampling
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_expected_residual_holds(name: str, options: dict[str, Any], seed: int) -> None:
    problem = Ridge(seed)
    A, B = theory.expected_residual(name, n=N, L=problem.L, **options)
    C = theory.residual_constant(A, problem.f_inf, problem.mean_f_i_inf)
    for x in points(problem):
        g = problem.gradients(x)
        mean = sum(q * (w @ g) for q, w in draws(name, options, problem.L))
        torch.testing.assert_close(mean, g.mean(0))  # the estimate is unbiased
        square = sum(q * (w @ g).square().sum().item() for q, w in draws(name, options, problem.L))
        bound = 2 * A * (problem.f(x).item() - problem.f_inf) + B * g.mean(0).square().sum().item() + C
        assert square <= bound * (1 + 1e-12)


@every_sampling
def test_expected_residual_is_as_small_as_can_be(name: str, options: dict[str, Any]) -> None:
    """In one dimension f_i = L_i (x - c_i)² / 2 has ‖∇f_i‖² = 2 L_i f_i: equality, where L_i is such that no i is better off."""
    p = options.get("probabilities", torch.ones(N, dtype=torch.float64))
    L = 1 / (1 / p - 1).clamp(min=1e-12) if name == "independent" else p.clone()
    if name == "importance":
        L = torch.tensor([1.0, 4.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    A, B = theory.expected_residual(name, n=N, L=L, **options)
    c = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5], dtype=torch.float64)
    if name == "independent":
        A = (1 / N) * 1.0  # of every i but the fourth, which is always drawn: p = 1 adds no variance
        assert theory.expected_residual(name, n=N, L=L, **options)[0] == pytest.approx(A)
        c[3] = 0.7
    for x in (-1.0, 0.7, 2.0):
        g = L * (x - c)
        f = (L * (x - c) ** 2 / 2).mean().item()
        if name == "independent":
            f -= (L[3] * (x - c[3]) ** 2 / 2).item() / N
        square = sum(q * (w @ g).item() ** 2 for q, w in draws(name, options, L))
        assert square == pytest.approx(2 * A * f + B * g.mean().item() ** 2, rel=1e-9)


def test_samplings_agree_where_they_are_the_same() -> None:
    L = torch.tensor([1.0, 3.0, 2.0])
    residual, third = theory.expected_residual, [1 / 3] * 3
    assert residual("single", n=3, L=L, probabilities=third) == pytest.approx(residual("uniform", n=3, L=L))
    assert residual("single", n=3, L=L, probabilities=L / 6) == pytest.approx(residual("importance", n=3, L=L))
    assert residual("tau_nice", n=3, L=L, tau=3) == residual("full", n=3, L=L) == (0, 1)
    assert residual("tau_nice", n=3, L=L, tau=1) == residual("uniform", n=3, L=[1, 3, 2]) == (3, 0)
    assert residual("tau_nice", n=1, L=2.0, tau=1) == (0, 1)
    assert residual("with_replacement", n=3, L=3.0, tau=1) == pytest.approx(residual("uniform", n=3, L=3.0))
    assert residual("independent", n=3, L=L, probabilities=[1.0, 1, 1]) == residual("full", n=3, L=L)


@every_sampling
def test_every_draw_is_as_smooth_as_said_and_one_of_them_no_smoother(name: str, options: dict[str, Any]) -> None:
    problem = Ridge(3)
    L = theory.sampled_smoothness(name, n=N, L=problem.L, **options)
    for _, w in draws(name, options, problem.L):
        hessian = problem.a.T @ (w[:, None] * problem.a) + w.sum() * problem.r * torch.eye(D, dtype=torch.float64)
        assert torch.linalg.eigvalsh(hessian)[-1].item() <= L * (1 + 1e-12)
    in_one_dimension = max((w @ problem.L).item() for q, w in draws(name, options, problem.L) if q > 0)
    assert in_one_dimension == pytest.approx(L)


def test_published_numbers() -> None:
    """Least squares, n = d = 100: μ = 0.1, L = 10, all the data."""
    A, B = theory.expected_residual("full", n=100, L=10.0)
    form_1 = {0.0: (0.0166667, 0.0236842), 0.5: (0.0333333, 0.0236842), 1.0: (0.05, 0.025)}
    form_2 = {0.0: (0.0125, 0.0125), 0.5: (0.025, 0.0125), 1.0: (0.025, 0.0125)}
    for form, published in ((1, form_1), (2, form_2)):
        for lambd, steps in published.items():
            assert [f"{step:.6g}" for step in theory.pl_constant_steps(0.1, 10.0, A, B, lambd, form)] == [f"{step:.6g}" for step in steps]
    for lambd, (rho, _) in form_1.items():
        assert theory.pl_largest_rho(0.1, 10.0, A, B, lambd) == pytest.approx(2 * rho, rel=1e-5)


def test_formulas_by_hand() -> None:
    """Each term on its own: bounds are too generous for a run to tell a factor."""
    for C, lambd, expected in ((5.0, 0.5, 1.806), (5.0, 1.0, 1.5 * (5 * 0.2 + 0.1 * 1.36)), (0.0, 0.5, 0.051), (5.0, 0.0, 2.52)):
        assert theory.pl_floor(2.0, 3.0, C, lambd, 0.1, 0.2) == pytest.approx(expected)
    for C, lambd, expected in ((5.0, 0.5, 8.004), (5.0, 1.0, 0.3 + 6.75 + 0.6 + 0.216), (0.0, 0.5, 0.504), (5.0, 0.0, 10.05)):
        assert theory.nonconvex_bound(100, 1.0, 3.0, C, lambd, 0.1, 0.2) == pytest.approx(expected)
    assert theory.descent_step(2.0, 0.25, 0.1) == pytest.approx(0.2)
    assert theory.residual_constant(3.0, 0.5, 0.25) == 1.5
    assert theory.nonconvex_steps(4, 2.0, 4.0, 0.0, 1.0) == pytest.approx((0.1875 / 2, 1 / 12))  # s = 1/4
    assert theory.nonconvex_steps(8, 4.0, 1.0, 1.0, 0.5) == pytest.approx((0.25 / 4, 1 / 18))  # s = 1/2
    assert theory.nonconvex_steps(100, 2.0, 0.0, 1.0, 0.0) == pytest.approx((0.1 / 2, 1 / 9))  # 1 / √T
    assert theory.nonconvex_steps(1, 2.0, 0.0, 3.0, 0.0) == pytest.approx((1 / 48, 1 / 27))  # 1 / (8 B)
    assert theory.nonconvex_steps(1, 2.0, 0.0, 0.0, 0.0) == pytest.approx((1 / 8, 1 / 2))


def test_rounding_is_no_error() -> None:
    assert theory.residual_constant(1.0, 0.3, 0.1 + 0.2) == 0.0
    assert theory.residual_constant(1.0, -0.1 - 0.2, -0.3) == 0.0
    assert theory.residual_constant(1.0, 0.0, 0.0) == 0.0
    assert theory.pl_largest_rho(1.0 + 1e-15, 1.0, 1.0, 0.0, 1.0) == pytest.approx(1.0)
    assert theory.pl_bound(3, 5.0, 0.3 + 1e-16, 10.0, 0.0, 0.0, 0.0, 1 / 0.3 * (1 + 1e-15)) == 0.0


def step(problem: Ridge, x: Tensor, w: Tensor, rho: float, gamma: float, lambd: float) -> Tensor:
    g = w @ problem.gradients(x)  # 0 where nothing was drawn
    return x - gamma * (w @ problem.gradients(x + rho * (1 - lambd + lambd / g.norm().clamp(min=1e-300)) * g))


def constants(problem: Ridge, name: str, options: dict[str, Any]) -> tuple[float, float, float, float]:
    """L, A, B, C."""
    A, B = theory.expected_residual(name, n=N, L=problem.L, **options)
    L = theory.sampled_smoothness(name, n=N, L=problem.L, **options)
    return L, A, B, theory.residual_constant(A, problem.f_inf, problem.mean_f_i_inf)


@every_sampling
@pytest.mark.parametrize("form", [1, 2])
@pytest.mark.parametrize("lambd", [0.0, 0.5, 1.0])
def test_a_step_keeps_the_pl_bound(name: str, options: dict[str, Any], form: int, lambd: float) -> None:
    """Expected over all draws, from anywhere: the bound of one step is that of all."""
    problem = Ridge(4)
    L, A, B, C = constants(problem, name, options)
    rho, gamma = theory.pl_constant_steps(problem.mu, L, A, B, lambd, form)
    floor = theory.pl_floor(problem.mu, L, C, lambd, rho, gamma)
    for x in points(problem, 8):
        gap = problem.f(x).item() - problem.f_inf
        mean = sum(q * problem.f(step(problem, x, w, rho, gamma, lambd)).item() for q, w in draws(name, options, problem.L))
        assert mean - problem.f_inf <= (1 - gamma * problem.mu) * gap + gamma * problem.mu * floor
        assert theory.pl_bound(0, gap, problem.mu, L, C, lambd, rho, gamma) == gap + floor
        assert theory.pl_bound(10**9, gap, problem.mu, L, C, lambd, rho, gamma) == pytest.approx(floor)


def many_runs(
    problem: Ridge, name: str, steps: int, of_step: Callable[[int], tuple[float, float]], lambd: float, runs: int = 200
) -> tuple[Tensor, Tensor]:
    """Means over runs from 0, at every step: of f - f_inf, of ‖∇f‖²."""
    weights, q = torch.stack([w for _, w in draws(name, {}, problem.L)]), torch.tensor([q for q, _ in draws(name, {}, problem.L)])
    x, n = torch.zeros(runs, problem.a.shape[1], dtype=torch.float64), len(problem.b)
    gaps, squares = [], []

    def gradient(at: Tensor, w: Tensor) -> Tensor:  # (runs, d), (runs, n)
        return (w * (at @ problem.a.T - problem.b)) @ problem.a + w.sum(1, keepdim=True) * problem.r * at

    for t in range(steps):
        gaps.append(problem.f(x).mean() - problem.f_inf)
        squares.append(gradient(x, torch.full((runs, n), 1 / n, dtype=torch.float64)).square().sum(1).mean())
        w, (rho, gamma) = weights[q.multinomial(runs, replacement=True)], of_step(t)
        g = gradient(x, w)
        x = x - gamma * gradient(x + rho * (1 - lambd + lambd / g.norm(dim=1, keepdim=True)) * g, w)
    return torch.stack(gaps), torch.stack(squares)


@pytest.mark.parametrize("name", ["uniform", "importance"])
@pytest.mark.parametrize("lambd", [0.0, 0.5, 1.0])
def test_runs_stay_below_the_pl_bound(name: str, lambd: float) -> None:
    problem = Ridge(5, r=0.5)
    L, A, B, C = constants(problem, name, {})
    rho, gamma = theory.pl_constant_steps(problem.mu, L, A, B, lambd)
    gaps, _ = many_runs(problem, name, 1500, lambda t: (rho, gamma), lambd)
    bounds = [theory.pl_bound(t, gaps[0].item(), problem.mu, L, C, lambd, rho, gamma) for t in range(1500)]
    assert (gaps <= torch.tensor(bounds)).all()
    assert gaps[-1] < gaps[0] / 2


@pytest.mark.parametrize("lambd", [0.0, 1.0])
def test_decreasing_steps_go_below_the_place_where_constant_ones_stay(lambd: float) -> None:
    problem, T = Ridge(6, r=1.0), 4000
    L, A, B, _ = constants(problem, "uniform", {})
    constant = theory.pl_constant_steps(problem.mu, L, A, B, lambd)
    decreasing = [theory.pl_decreasing_steps(t, problem.mu, L, A, B, lambd) for t in range(T)]
    assert decreasing[0] == (min(constant[0], 1.0), min(constant[1], 1 / problem.mu))
    assert decreasing[-1] == (1 / (2 * (T - 1) + 1), (2 * (T - 1) + 1) / (T**2 * problem.mu))
    stays, _ = many_runs(problem, "uniform", T, lambda t: constant, lambd, runs=40)
    goes_on, _ = many_runs(problem, "uniform", T, lambda t: decreasing[t], lambd, runs=40)
    assert goes_on[-500:].mean() < stays[-500:].mean() / 3


@every_sampling
@pytest.mark.parametrize("lambd", [0.0, 0.5, 1.0])
def test_nonconvex_steps_are_admissible(name: str, options: dict[str, Any], lambd: float) -> None:
    A, B = theory.expected_residual(name, n=N, L=[3.0, 1.0, 2.0, 5.0, 4.0], **options)
    L, u = theory.sampled_smoothness(name, n=N, L=[3.0, 1.0, 2.0, 5.0, 4.0], **options), (1 - lambd) ** 2
    bounds = []
    for T in (1, 100, 10_000, 1_000_000):
        rho, gamma = theory.nonconvex_steps(T, L, A, B, lambd)
        slack = 1 + 1e-12
        assert L * rho <= 1 / 4 * slack
        assert L * rho * u * B <= 1 / 8 * slack
        assert L * gamma * B <= 2 / 9 * slack
        assert (gamma * L * rho * u + L * gamma**2 * (1 + 2 * (L * rho) ** 2 * u)) * 2 * A * T <= slack
        bounds.append(theory.nonconvex_bound(T, 1.0, L, 2 * A, lambd, rho, gamma))
    assert bounds[3] / bounds[2] <= 0.11  # 100 times the steps, a tenth of the bound


@pytest.mark.parametrize("lambd", [0.0, 0.5, 1.0])
def test_runs_stay_below_the_nonconvex_bound(lambd: float) -> None:
    problem = Ridge(7)
    L, A, B, C = constants(problem, "uniform", {})
    for T in (10, 1000):
        rho, gamma = theory.nonconvex_steps(T, L, A, B, lambd)
        gaps, squares = many_runs(problem, "uniform", T, lambda t, steps=(rho, gamma): steps, lambd)
        assert squares.min() <= theory.nonconvex_bound(T, gaps[0].item(), L, C, lambd, rho, gamma)


@pytest.mark.parametrize("sign", [1, -1], ids=["usam", "extragradient"])
@pytest.mark.parametrize(("nu", "delta"), [(0.0, 1.0), (0.3, 0.1), (0.9, 0.1), (0.5, 0.99)])
def test_a_step_below_the_condition_descends(sign: int, nu: float, delta: float) -> None:
    """f(x) = Σ log(1 + (Ax - b)²), not convex, of smoothness 2 ‖A‖²; and the quadratic in one dimension."""
    a, b = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    L = 2 * torch.linalg.matrix_norm(a, 2).item() ** 2
    t = theory.descent_step(L, nu / L, delta)

    def gradient(x: Tensor) -> Tensor:
        r = a @ x - b
        return a.T @ (2 * r / (1 + r**2))

    for scale in (0.01, 0.1, 1.0, 10.0):
        x = scale * torch.randn(4, dtype=torch.float64)
        g = gradient(x)
        after = x - t * gradient(x + sign * nu / L * g)
        before, later = (torch.log1p((a @ y - b) ** 2).sum() for y in (x, after))
        assert later <= before - t * delta / 2 * g.square().sum()
    contraction = 1 - t * L * (1 + sign * nu)
    assert contraction**2 / 2 <= 1 / 2 - t * L * delta / 2


def test_at_nu_0_the_condition_is_exact() -> None:
    """On x² / 2 gradient descent with t = 2 - δ gives f(x⁺) = f(x) - (t δ / 2) ‖∇f‖²."""
    t = theory.descent_step(1.0, 0.0, 0.3)
    assert (1 - t) ** 2 / 2 == pytest.approx(1 / 2 - t * 0.3 / 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: theory.expected_residual("nice", n=2, L=1.0), ValueError, "expected_residual: sampling must be one of 'tau_nice'"),
        (lambda: theory.expected_residual("uniform", n=0, L=1.0), ValueError, "expected_residual: n must be at least 1, got 0"),
        (lambda: theory.expected_residual("uniform", n=2, L=0.0), ValueError, r"L\[0\] must be finite and more than 0.0, got 0.0"),
        (lambda: theory.expected_residual("uniform", n=2, L=[1.0, math.nan]), ValueError, r"L\[1\] must be finite and more than 0.0"),
        (lambda: theory.expected_residual("uniform", n=2, L=[1.0]), ValueError, "L must have n = 2 elements, got 1"),
        (lambda: theory.expected_residual("uniform", n=2, L=1.0, tau=1), ValueError, "tau does not go with 'uniform'"),
        (lambda: theory.expected_residual("importance", n=2, L=1.0, probabilities=[0.5] * 2), ValueError, "probabilities does not go with"),
        (lambda: theory.expected_residual("tau_nice", n=2, L=1.0), ValueError, "'tau_nice' needs tau"),
        (lambda: theory.expected_residual("tau_nice", n=2, L=1.0, tau=3), ValueError, "tau must be at most 2, got 3"),
        (lambda: theory.expected_residual("single", n=2, L=1.0), ValueError, "'single' needs probabilities"),
        (lambda: theory.expected_residual("single", n=2, L=1.0, probabilities=[0.5, 0.4]), ValueError, "probabilities must sum to 1"),
        (lambda: theory.expected_residual("single", n=2, L=1.0, probabilities=[1.0]), ValueError, "probabilities must have n = 2 elements"),
        (lambda: theory.expected_residual("independent", n=1, L=1.0, probabilities=[1.5]), ValueError, "largest of probabilities must be"),
        (lambda: theory.residual_constant(1.0, 0.0, 0.1), ValueError, "residual_constant: mean_f_i_inf must be a finite number"),
        (lambda: theory.residual_constant(1.0, 0.3, 0.3000001), ValueError, r"mean_f_i_inf must be a finite number in \(-inf, 0.3\]"),
        (lambda: theory.pl_constant_steps(1.001, 1.0, 1.0, 0.0, 0.5), ValueError, "pl_constant_steps: mu must be at most L, .* mu = 1.001"),
        (lambda: theory.pl_largest_rho(2.0, 1.0, 1.0, 0.0, 0.5), ValueError, "pl_largest_rho: mu must be at most L"),
        (lambda: theory.pl_floor(2.0, 1.0, 1.0, 0.5, 0.1, 0.1), ValueError, "pl_floor: mu must be at most L"),
        (lambda: theory.pl_floor(0.5, 1.0, 1.0, 0.5, 0.1, 2.1), ValueError, r"pl_floor: gamma \* mu must be at most 1, .* gamma = 2.1"),
        (lambda: theory.pl_bound(1, 1.0, 0.5, 1.0, 1.0, 0.5, 0.1, 2.1), ValueError, r"pl_bound: gamma \* mu must be at most 1"),
        (lambda: theory.pl_bound(1, 1.0, "1", 1.0, 1.0, 0.5, 0.1, 0.1), TypeError, "pl_bound: mu must be a number"),  # type: ignore[arg-type]
        (lambda: theory.pl_constant_steps(0.0, 1.0, 1.0, 0.0, 0.5), ValueError, r"mu must be a finite number in \(0.0"),
        (lambda: theory.pl_constant_steps(1.0, 1.0, 1.0, 0.0, 1.5), ValueError, r"lambd must be a finite number in \[0.0, 1.0\]"),
        (lambda: theory.pl_constant_steps(1.0, 1.0, 0.0, 0.0, 0.5), ValueError, "A and B must not both be 0"),
        (lambda: theory.pl_constant_steps(1.0, 1.0, 1.0, 0.0, 0.5, form=3), ValueError, "form must be at most 2, got 3"),
        (lambda: theory.pl_decreasing_steps(-1, 1.0, 1.0, 1.0, 0.0, 0.5), ValueError, "pl_decreasing_steps: t must be at least 0, got -1"),
        (lambda: theory.nonconvex_steps(0, 1.0, 1.0, 0.0, 0.5), ValueError, "nonconvex_steps: T must be at least 1, got 0"),
        (lambda: theory.nonconvex_bound(1, 1.0, 1.0, 1.0, 0.5, 0.1, 0.0), ValueError, "nonconvex_bound: gamma must be"),
        (lambda: theory.pl_bound(1, -1.0, 1.0, 1.0, 1.0, 0.5, 0.1, 0.1), ValueError, "pl_bound: gap must be"),
        (lambda: theory.descent_step(2.0, 0.5, 0.1), ValueError, r"descent_step: rho must be a finite number in \[0.0, 0.5\)"),
        (lambda: theory.descent_step(1.0, 0.5, 1.0), ValueError, "descent_step: delta must be"),
        (lambda: theory.descent_step("1", 0.5, 1.0), TypeError, "descent_step: L must be a number, got '1'"),  # type: ignore[arg-type]
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
