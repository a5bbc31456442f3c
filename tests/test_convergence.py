"""What is proved about SAM's convergence, with the library's optimizers in float64.

Sources: Fundamental Convergence Analysis of SAM (arXiv 2401.08060) and Unified SAM (arXiv 2503.02225). Plain formulas stand beside the
optimizers where a claim takes more steps than a test should make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels import theory
from sam_kernels.schedules import AlmostConstantRadius, DecreasingRadius, Diminish1, Diminish2, PLDecreasing

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = torch.finfo(torch.float64).eps


class Quadratic:
    """f(x) = ½ Σ h_i x_i², minimum 0 at 0."""

    def __init__(self, *curvatures: float) -> None:
        self.h = torch.tensor(curvatures, dtype=torch.float64)
        self.L, self.mu, self.dim = max(curvatures), min(curvatures), len(curvatures)

    def f(self, x: Tensor) -> Tensor:
        return (self.h * x.square()).sum(-1) / 2

    def gradient(self, x: Tensor) -> Tensor:
        return self.h * x

    def rounding(self, x: Tensor) -> Tensor:
        """How far f may be off, in the order of eps: terms of three roundings, summed."""
        return (self.dim + 3) * EPS * self.f(x)


class LogSquares:
    """f(x) = Σ log(1 + (A x - b)_i²): not convex, of smoothness L = 2 ‖A‖² = 2. arXiv 2401.08060.

    b = A x*, so that the minimum is 0, and A has singular values from 1/2 to 1, so that it is reached before long.
    """

    def __init__(self, n: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        u, _, v = torch.linalg.svd(torch.randn(n, n, generator=generator, dtype=torch.float64))
        self.a = u * torch.linspace(0.5, 1.0, n, dtype=torch.float64) @ v
        self.minimum = torch.randn(n, generator=generator, dtype=torch.float64)
        self.b, self.dim = self.a @ self.minimum, n
        self.L = 2 * torch.linalg.matrix_norm(self.a, 2).item() ** 2

    def f(self, x: Tensor) -> Tensor:
        return torch.log1p((self.a @ x - self.b).square()).sum()

    def gradient(self, x: Tensor) -> Tensor:
        r = self.a @ x - self.b
        return self.a.T @ (2 * r / (1 + r.square()))

    def rounding(self, x: Tensor) -> Tensor:
        """r is off by its dot product, f by no more than 2 |r| / (1 + r²) times that, and by its own sum."""
        r = self.a @ x - self.b
        off = (self.dim + 1) * EPS * (self.a.abs() @ x.abs() + self.b.abs())
        return (2 * r.abs() / (1 + r.square()) * off).sum() + (self.dim + 3) * EPS * self.f(x)


Problem = Quadratic | LogSquares


def usam(params: list[nn.Parameter], **options: Any) -> Any:
    return sam_kernels.USAM(params, torch.optim.SGD, **options)


def extragradient(params: list[nn.Parameter], **options: Any) -> Any:
    return sam_kernels.Extragradient(params, torch.optim.SGD, **options)


def sam(params: list[nn.Parameter], **options: Any) -> Any:
    return sam_kernels.SAM(params, torch.optim.SGD, **options)


def iterates(
    problem: Any, start: Tensor, steps: int, make: Callable[..., Any], scheduler: Callable[[Any], Any] | None = None, **options: Any
) -> Iterator[Tensor]:
    """x_0 … x_steps. ``make(params, **options)`` is the optimizer; ``scheduler`` steps after each of its steps."""
    x = nn.Parameter(start.clone())
    optimizer = make([x], **options)
    scheduled = None if scheduler is None else scheduler(optimizer)

    def closure() -> None:
        x.grad = problem.gradient(x.detach())

    yield x.detach().clone()
    for _ in range(steps):
        optimizer.step(closure)
        if scheduled is not None:
            scheduled.step()
        yield x.detach().clone()


def violations(problem: Problem, xs: list[Tensor], t: float, delta: float) -> list[int]:
    """Steps with f(x⁺) > f(x) - (t δ / 2) ‖∇f(x)‖², beyond what rounding explains.

    The optimizer rounds x + ρ g, its gradient and x - t g' some ten times a coordinate, f feels that times its gradient, and is rounded
    itself, on both sides.
    """
    found = []
    for k, (x, after) in enumerate(pairwise(xs)):
        g = problem.gradient(x)
        moved = 10 * EPS * (x.norm() + after.norm()) * (problem.gradient(after).norm() + g.norm())
        limit = problem.f(x) - t * delta / 2 * g.square().sum()
        if problem.f(after) > limit + problem.rounding(x) + problem.rounding(after) + moved:
            found.append(k)
    return found


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "quadratic": lambda: Quadratic(1.0, 3.0),
    "ill-conditioned": lambda: Quadratic(0.01, 0.5, 2.0, 40.0),
    "log, n = 2": lambda: LogSquares(2),
    "log, n = 20": lambda: LogSquares(20),
}
every_problem = pytest.mark.parametrize("problem", PROBLEMS)


def starts(problem: Problem) -> list[Tensor]:
    return [scale * torch.randn(problem.dim, dtype=torch.float64) for scale in (0.01, 1.0, 10.0)]


@every_problem
@pytest.mark.parametrize("make", [usam, extragradient], ids=["usam", "extragradient"])
@pytest.mark.parametrize(("nu", "share"), [(0.0, 0.5), (0.3, 0.1), (0.5, 0.9), (0.9, 0.5)])
def test_every_step_descends(make: Callable[..., Any], problem: str, nu: float, share: float) -> None:
    """At the largest learning rate proved for ν = L ρ and δ, a share of the 2 - 2 ν there is."""
    made = PROBLEMS[problem]()
    rho, delta = nu / made.L, share * (2 - 2 * nu)
    t = theory.descent_step(made.L, rho, delta)
    for start in starts(made):
        xs = list(iterates(made, start, 150, make, rho=rho, lr=t))
        assert violations(made, xs, t, delta) == []
        assert made.f(xs[-1]) < made.f(xs[0])


@every_problem
@pytest.mark.parametrize("make", [usam, extragradient], ids=["usam", "extragradient"])
def test_a_step_that_is_too_long_is_seen(make: Callable[..., Any], problem: str) -> None:
    made = PROBLEMS[problem]()
    minimum = made.minimum if isinstance(made, LogSquares) else torch.zeros(made.dim, dtype=torch.float64)
    t = 2.2 / made.L
    xs = list(iterates(made, minimum + 0.01 * torch.randn(made.dim, dtype=torch.float64), 150, make, rho=0.0, lr=t))
    assert violations(made, xs, t, 0.01)


@every_problem
def test_normalised_sam_does_not_descend_at_every_step(problem: str) -> None:
    """Its radius does not shrink with the gradient: the inequality is not one of all of the family."""
    made = PROBLEMS[problem]()
    rho = 0.3 / made.L
    t = theory.descent_step(made.L, rho, 0.1)
    assert violations(made, list(iterates(made, starts(made)[0], 150, sam, rho=rho, lr=t)), t, 0.1)


# --- constant steps stall, diminishing ones converge ---

PAPER = Quadratic(1.0, 3.0)
START = torch.ones(2, dtype=torch.float64)


def plain(steps: int, lr: Callable[[int], float], rho: Callable[[int], float]) -> list[float]:
    """‖∇f(x_k)‖ of SAM from (1, 1) for k = 1, 2, …, with the formula and nothing else."""
    x, y, norms = 1.0, 1.0, []
    for k in range(1, steps + 1):
        norm = math.hypot(x, 3 * y)
        scale = rho(k) / (norm + 1e-12)
        x, y = x - lr(k) * (x + scale * x), y - lr(k) * 3 * (y + scale * 3 * y)
        norms.append(math.hypot(x, 3 * y))
    return norms


def gradient_norms(xs: Iterator[Tensor]) -> list[float]:
    """‖∇f(x_k)‖ for k = 1, 2, …"""
    return [PAPER.gradient(x).norm().item() for x in xs][1:]


def test_constant_steps_stall() -> None:
    """Along the steep axis x jumps to and fro: x - 0.2 · 3 (x + 0.1) = -x, so 3 x = 9 / 70 = 0.1286."""
    norms = gradient_norms(iterates(PAPER, START, 400, sam, lr=0.2, rho=0.1))
    formula = plain(200_000, lambda k: 0.2, lambda k: 0.1)
    assert norms == pytest.approx(formula[:400], rel=1e-12, abs=0)
    assert norms[-100:] == pytest.approx([9 / 70] * 100, rel=1e-9)
    assert formula[-1] == pytest.approx(9 / 70, rel=1e-9)


def test_diminishing_steps_converge() -> None:
    """t_k = 1 / k and ρ_k = 0.1 / k^0.001: ‖∇f‖ = 2.22e-6 after 2 · 10⁵ steps, of which the optimizer makes the first 2000."""
    norms = gradient_norms(iterates(PAPER, START, 2000, sam, Diminish1, lr=1.0, rho=AlmostConstantRadius(0.1)))
    formula = plain(200_000, lambda k: 1 / k, lambda k: 0.1 / k**0.001)
    # Errors are not amplified, so those of t_k, each step's a rounding or two, decide: 2 k eps.
    assert norms == pytest.approx(formula[:2000], rel=4 * 2000 * EPS, abs=0)
    assert formula[-1] == pytest.approx(2.22e-6, abs=5e-9)


def test_an_almost_constant_radius_is() -> None:
    assert AlmostConstantRadius(0.1)(10**6) / 0.1 == pytest.approx(0.986, abs=5e-4)


@pytest.mark.parametrize("n", [2, 20])
@pytest.mark.parametrize(
    ("scheduler", "p", "factor"),
    [pytest.param(Diminish1, 0.001, 8.0, id="1/k"), pytest.param(Diminish2, 0.6, 1.0, id="1/k^0.5001")],
)
def test_without_convexity_the_gradient_vanishes(n: int, scheduler: Callable[[Any], Any], p: float, factor: float) -> None:
    """Σ t_k = ∞, t_k ↓ 0, Σ t_k ρ_k < ∞: ‖∇f‖ goes to 0 as t_k ρ_k or ρ_k does. With both constant it stays where it is."""
    problem = LogSquares(n)
    start = problem.minimum + 4 * torch.randn(n, dtype=torch.float64)
    assert ((problem.a @ start - problem.b).abs() > 1).any()  # from where f is not convex

    def norms(*args: Any, **options: Any) -> list[float]:
        return [problem.gradient(x).norm().item() for x in iterates(problem, start, *args, **options)]

    diminishing = norms(4000, sam, scheduler, lr=factor / problem.L, rho=AlmostConstantRadius(0.1, p))
    assert max(diminishing[2000:]) < 1e-3 * diminishing[0]
    assert diminishing[4000] < 0.6 * diminishing[2000]
    assert min(norms(1000, sam, lr=1 / problem.L, rho=0.1)[500:]) > 0.1


# --- Unified SAM on μ-PL functions: ρ_t = min{ρ, 1 / (2 t + 1)}, γ_t = min{γ, (2 t + 1) / ((t + 1)² μ)}, t = 0, 1, … ---


@pytest.mark.parametrize("lambd", [0.0, 0.5, 1.0])
def test_with_all_the_data(lambd: float) -> None:
    """Constant steps stay below their bound, and above 0 where anything is normalised; decreasing ones reach the minimum."""
    problem, start, T = Quadratic(0.5, 1.0, 2.0), torch.ones(3, dtype=torch.float64), 2000
    mu, L = problem.mu, problem.L
    A, B = theory.expected_residual("full", n=1, L=L)
    rho, gamma = theory.pl_constant_steps(mu, L, A, B, lambd)

    def gaps(*args: Any, **options: Any) -> Tensor:
        return torch.stack([problem.f(x) for x in iterates(problem, start, T, sam, *args, lr=gamma, lambd=lambd, **options)])

    constant = gaps(rho=rho)
    bounds = [theory.pl_bound(t, constant[0].item(), mu, L, 0.0, lambd, rho, gamma) for t in range(T + 1)]
    assert (constant <= torch.tensor(bounds, dtype=torch.float64)).all()
    assert (constant[T] > 1e-5) == (lambd > 0)
    decreasing = gaps(lambda optimizer: PLDecreasing(optimizer, mu), rho=DecreasingRadius(rho))
    assert decreasing[T] < 1e-9 * decreasing[0]


class OneOfMany:
    """f = (1 / n) Σ f_i, f_i(x) = ½ (a_i'x - b_i)² + ½ r ‖x‖²; every row of x is a run of its own, with its own draws of i."""

    def __init__(self, n: int = 5, d: int = 3, r: float = 1.0) -> None:
        self.a, self.b = torch.randn(n, d, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
        self.r, self.n = r, n
        self.smoothness = self.a.square().sum(1) + r
        hessian = self.a.T @ self.a / n + r * torch.eye(d, dtype=torch.float64)
        self.mu = torch.linalg.eigvalsh(hessian)[0].item()
        self.f_inf = self.f(torch.linalg.solve(hessian, self.a.T @ self.b / n)).item()
        self.mean_f_i_inf = (r * self.b.square() / (2 * self.smoothness)).mean().item()
        self.drawn: Tensor | None = None

    def f(self, x: Tensor) -> Tensor:
        return (x @ self.a.T - self.b).square().mean(-1) / 2 + self.r / 2 * x.square().sum(-1)

    def gradient(self, x: Tensor) -> Tensor:
        """Of the f_i drawn; the second pass of a step has the draws of the first."""
        drawn = torch.randint(self.n, (len(x),)) if self.drawn is None else self.drawn
        self.drawn = drawn if self.drawn is None else None
        a = self.a[drawn]
        return ((a * x).sum(1) - self.b[drawn])[:, None] * a + self.r * x


def test_one_sample_a_step() -> None:
    """Of USAM, whose step has no norm that would join the runs; means over 200 of them."""
    problem, T = OneOfMany(), 1500
    A, B = theory.expected_residual("uniform", n=problem.n, L=problem.smoothness)
    L = theory.sampled_smoothness("uniform", n=problem.n, L=problem.smoothness)
    C = theory.residual_constant(A, problem.f_inf, problem.mean_f_i_inf)
    rho, gamma = theory.pl_constant_steps(problem.mu, L, A, B, 0.0)
    start = torch.full((200, 3), 3.0, dtype=torch.float64)

    def gaps(*args: Any, **options: Any) -> Tensor:
        return torch.stack([problem.f(x).mean() for x in iterates(problem, start, T, usam, *args, lr=gamma, **options)]) - problem.f_inf

    constant = gaps(rho=rho)
    bounds = [theory.pl_bound(t, constant[0].item(), problem.mu, L, C, 0.0, rho, gamma) for t in range(T + 1)]
    assert (constant <= torch.tensor(bounds, dtype=torch.float64)).all()
    decreasing = gaps(lambda optimizer: PLDecreasing(optimizer, problem.mu), rho=DecreasingRadius(rho))
    assert constant[T] < constant[0] / 100
    assert decreasing[-300:].mean() < constant[-300:].mean() / 3
