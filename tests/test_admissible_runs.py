"""``theory.admissible``, what it claims: runs of SAM and USAM in float64, the inequalities of docs/convergence.md, and its counterexamples.

Sources: arXiv 2401.08060; the derivations of docs/convergence.md. Plain formulas make the long runs; the library's optimizers make the
same first steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import theory
from sam_kernels.schedules import AlmostConstantRadius
from tests.test_convergence import EPS, LogSquares, Quadratic, iterates, sam, usam

pytestmark = pytest.mark.usefixtures("one_thread")
Law = tuple[float, float]
TO_FOUR, TO_FIVE = (1, 2, 3, 4), (1, 2, 3, 4, 5)
STEPS = 40_000


@dataclass(frozen=True)
class Function:
    """A function of one number: f, f', its smoothness, a start, the minimum that runs from there end at, and what is true of it."""

    f: Callable[[float], float]
    df: Callable[[float], float]
    L: float
    start: float
    minimum: float
    convex: bool = False
    kl_exponent: float | None = None
    minimisers: str | None = None

    def gradient(self, x: Tensor) -> Tensor:
        return torch.tensor([self.df(x.item())], dtype=torch.float64)

    def ask(self, steps: Law, radii: Law, **options: Any) -> theory.Admissible:
        known = {"convex": self.convex, "kl_exponent": self.kl_exponent, "minimisers": self.minimisers}
        return theory.admissible(steps, radii, self.L, **known, **options)


def huber(x: float) -> float:
    return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5


WELL = 1.8954942670339809**2 / 2 + 2 * math.cos(1.8954942670339809)
FUNCTIONS = {
    "convex, one minimiser": Function(lambda x: x * x, lambda x: 2 * x, 2.0, 3.0, 0.0, True, 0.5, "unique"),
    "convex, minimisers [-1, 1]": Function(
        lambda x: max(abs(x) - 1, 0.0) ** 2 / 2, lambda x: x - max(-1.0, min(1.0, x)), 1.0, 4.0, 0.0, True, 0.5, "bounded"
    ),
    "convex, no minimiser": Function(lambda x: math.log1p(math.exp(x)), lambda x: 1 / (1 + math.exp(-x)), 0.25, 1.0, 0.0, True),
    # Two wells at ±1.8955 and a maximum between them; f'' = 1 - 2 cos x.
    "two wells": Function(lambda x: x * x / 2 + 2 * math.cos(x), lambda x: x - 2 * math.sin(x), 3.0, 1.0, WELL, kl_exponent=0.5),
    # x⁴, linear beyond |x| = 1, where no run goes.
    "x^4": Function(
        lambda x: x**4 if abs(x) <= 1 else 4 * abs(x) - 3,
        lambda x: 4 * max(-1.0, min(1.0, x)) ** 3,
        12.0,
        0.9,
        0.0,
        kl_exponent=0.75,
    ),
}


def run(
    function: Function, steps: Law, radii: Law, count: int, *, normalised: bool = True, start: float | None = None, eps: float = 0.0
) -> list[float]:
    """x_1 … x_count by the formula, with t_k = c/k^p and ρ_k = C/k^q; ``eps`` is added to the norm."""
    (c, p), (C, q), df = steps, radii, function.df
    x = function.start if start is None else start
    xs = [x]
    for k in range(1, count):
        g = df(x)
        scale = C * k**-q / ((abs(g) + eps or 1.0) if normalised else 1.0)
        x -= c * k**-p * df(x + scale * g)
        xs.append(x)
    return xs


def by_the_library(function: Any, steps: Law, radii: Law, count: int, start: Tensor, *, normalised: bool = True) -> list[Tensor]:
    """The same with the library's optimizers around SGD."""

    def scheduler(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: (e + 1) ** -steps[1])

    rho = AlmostConstantRadius(*radii)
    return list(iterates(function, start, count - 1, sam if normalised else usam, scheduler, lr=steps[0], rho=rho))


@pytest.mark.parametrize("normalised", [True, False], ids=["sam", "usam"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_optimizers_make_the_steps_of_the_formula(name: str, normalised: bool) -> None:
    function, laws = FUNCTIONS[name], ((0.3 / FUNCTIONS[name].L, 0.6), (0.4 / FUNCTIONS[name].L, 0.3))
    start = torch.tensor([function.start], dtype=torch.float64)
    library = torch.cat(by_the_library(function, *laws, 200, start, normalised=normalised))
    formula = torch.tensor(run(function, *laws, 200, normalised=normalised, eps=1e-12), dtype=torch.float64)
    # A rounding or two a step, of numbers up to 4. Errors grow by 1 + L t_k at most, where f is concave: e^(L Σ t_k) < e^6.
    assert (library - formula).abs().max() <= 200 * 10 * EPS * math.exp(6)


# --- properties ---


RUNS = [
    # (name, steps, radii, normalised, properties that admissible gives): the paper's conditions first, then the derived ones.
    ("two wells", (1.0, 1.0), (0.5, 0.3), True, TO_FIVE),
    ("two wells", (0.5, 0.6), (0.5, 0.45), True, TO_FIVE),
    ("x^4", (0.1, 0.6), (0.2, 0.5), True, TO_FIVE),
    ("convex, one minimiser", (1.0, 0.75), (0.5, 0.0), True, TO_FIVE),
    ("convex, minimisers [-1, 1]", (1.0, 0.6), (0.5, 0.5), True, TO_FIVE),
    ("convex, no minimiser", (1.0, 0.55), (0.5, 0.5), True, TO_FIVE),
    ("two wells", (0.5, 0.6), (0.5, 0.25), True, TO_FOUR),
    ("x^4", (0.1, 0.5), (0.2, 0.3), True, TO_FOUR),
    ("two wells", (0.3, 0.0), (0.5, 0.6), True, TO_FOUR),
    ("convex, one minimiser", (0.5, 0.3), (0.5, 0.0), True, TO_FIVE),
    ("convex, one minimiser", (0.5, 0.0), (0.5, 0.2), True, TO_FIVE),
    ("convex, minimisers [-1, 1]", (1.0, 0.4), (0.5, 0.0), True, TO_FOUR),
    ("convex, no minimiser", (1.0, 0.4), (0.5, 0.2), True, TO_FOUR),
    ("two wells", (0.2, 0.0), (0.3, 0.0), False, TO_FIVE),
    ("two wells", (0.5, 0.6), (0.3, 0.0), False, TO_FIVE),
    ("x^4", (0.05, 0.0), (0.08, 0.0), False, TO_FIVE),
    ("x^4", (0.05, 0.3), (5.0, 0.2), False, TO_FIVE),
    ("convex, one minimiser", (0.3, 0.0), (0.5, 0.0), False, TO_FIVE),  # ν = 1
    ("convex, minimisers [-1, 1]", (0.4, 0.5), (3.0, 0.0), False, TO_FIVE),  # ν = 3
    ("convex, no minimiser", (4.0, 0.0), (2.0, 0.0), False, TO_FIVE),
]


@pytest.mark.parametrize(("name", "steps", "radii", "normalised", "expected"), RUNS)
def test_each_property_that_is_claimed_holds(name: str, steps: Law, radii: Law, normalised: bool, expected: tuple[int, ...]) -> None:
    """Largest values over two windows of a run: steps 400 to 800, and its second half. All of them decay like powers of k.

    x⁴ is the slowest: x is about k^-0.2 where t_k is about k^-0.6, a factor of 2.2 from window to window.
    """
    function = FUNCTIONS[name]
    assert function.ask(steps, radii, normalised=normalised).properties == expected
    xs = run(function, steps, radii, STEPS, normalised=normalised)
    early, late = xs[400:800], xs[STEPS // 2 :]

    def falls(measure: Callable[[list[float]], float]) -> bool:
        return measure(late) <= max(0.6 * measure(early), 100 * EPS)

    assert falls(lambda window: max(abs(function.df(x)) for x in window)), "(3), and so (1) and (2)"
    if name == "convex, no minimiser":  # nothing accumulates: (4) and (5) are for those that have one
        assert max(late) < min(early)
        return
    assert falls(lambda window: max(abs(function.f(x) - function.minimum) for x in window)), "(4)"
    if 5 in expected:
        assert falls(lambda window: max(window) - min(window)), "(5)"


def test_a_stationary_point_need_not_be_a_minimiser() -> None:
    """From within ρ of a maximiser the ascent goes beyond it, and the descent from there towards it: SAM ends at the maximiser 0."""
    function, laws = FUNCTIONS["two wells"], ((0.5, 0.6), (0.5, 0.45))
    assert function.ask(*laws).properties == TO_FIVE
    assert abs(run(function, *laws, STEPS, start=0.05)[-1]) < 1e-6
    assert function.df(0.0) == 0.0
    assert function.f(0.0) > function.f(0.1)


@pytest.mark.parametrize(("p", "exponents"), [(0.0, (2.0, 0.5)), (0.5, (1.0, 0.25))])
def test_rates_of_x4_are_those_of_its_exponent(p: float, exponents: tuple[float, float]) -> None:
    """f(x) = x⁴ has the exponent 3/4: for USAM, values are O(k^-2) and iterates O(k^-1/2) with constant steps, and that is what they do."""
    function = FUNCTIONS["x^4"]
    rates = function.ask((0.05, p), (0.05, 0.0), normalised=False).rates
    assert rates is not None
    assert (rates.values, rates.iterates) == tuple(f"O(k^-{exponent:g})" for exponent in exponents)
    xs = run(function, (0.05, p), (0.05, 0.0), STEPS, normalised=False)
    measured = [math.log(measure(xs[STEPS // 10]) / measure(xs[-1])) / math.log(10) for measure in (function.f, abs)]
    assert measured == pytest.approx(exponents, rel=0.05)  # S_k = t_1 + … is 2 c √k to first order


def test_rates_of_a_quadratic_are_linear() -> None:
    function = FUNCTIONS["convex, one minimiser"]
    assert function.ask((0.1, 0), (0.1, 0), normalised=False).rates == ("O(r^k), r < 1",) * 3
    xs = run(function, (0.1, 0), (0.1, 0), 100, normalised=False)
    assert all(later / x == pytest.approx(1 - 0.1 * 2 * 1.2) for x, later in pairwise(xs))


def test_any_normalised_direction() -> None:
    """Errors of length ρ_k in random directions, on a ring of minimisers: x converges, though nothing holds it at one point of the ring."""
    generator = torch.Generator().manual_seed(0)
    angles = (2 * math.pi * torch.rand(STEPS, generator=generator, dtype=torch.float64)).tolist()
    assert theory.admissible((1, 0.8), (0.5, 0.3), None, kl_exponent=0.5).properties == TO_FIVE
    x, y, path = 1.5, 0.5, []
    for k, angle in enumerate(angles, start=1):
        u, v = x + 0.5 * k**-0.3 * math.cos(angle), y + 0.5 * k**-0.3 * math.sin(angle)
        r = math.hypot(u, v)  # f = (r - 1)²/2
        x, y = x - k**-0.8 * (u - u / r), y - k**-0.8 * (v - v / r)
        path.append((x, y))
    gradients = [abs(math.hypot(*point) - 1) for point in path]
    assert max(gradients[STEPS // 2 :]) < 0.3 * max(gradients[400:800])
    spread = [max(math.dist(a, window[0]) for a in window) for window in (path[400:800], path[STEPS // 2 :])]
    assert spread[1] < 0.3 * spread[0]


# --- the inequalities behind the derived properties ---

PROBLEMS = {"quadratic": Quadratic(0.01, 0.5, 2.0), "log": LogSquares(5)}


def rounding_of(problem: Any, x: Tensor, after: Tensor) -> Tensor:
    return 100 * EPS * (1 + problem.f(x) + problem.f(after))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_step_with_an_absolute_error(problem: str, share: float) -> None:
    """f(x⁺) ≤ f - t (1 - L t/2) G² + t |1 - L t| G ε + (L t²/2) ε², ε = L ρ, along any direction; with t ≤ 1/L, f falls where G > ε."""
    made = PROBLEMS[problem]
    t = share * 2 / made.L
    for rho, scale in [(0.01, 1.0), (1.0, 1.0), (1.0, 0.01), (10.0, 5.0)]:
        for _ in range(20):
            x, d = scale * torch.randn(2, made.dim, dtype=torch.float64)
            g, epsilon = made.gradient(x), made.L * rho
            G = g.norm()
            after = x - t * made.gradient(x + rho * d / d.norm())
            bound = made.f(x) - t * (1 - made.L * t / 2) * G**2 + t * abs(1 - made.L * t) * G * epsilon + made.L * t**2 / 2 * epsilon**2
            assert made.f(after) <= bound + rounding_of(made, x, after)
            assert bound < made.f(x) or share > 0.5 or epsilon >= G


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_step_of_sam_on_a_convex_function(share: float) -> None:
    """f(x⁺) ≤ f - t (1 - (1 + a) L t/2) G² + (1 + 1/a) L³ t² ρ²/2 for every a > 0: no term of t ρ, as there is without convexity."""
    made = PROBLEMS["quadratic"]
    t = share * 2 / made.L
    for rho, scale, a in [(0.01, 1.0, 0.1), (1.0, 1.0, 1e-3), (1.0, 0.01, 1.0), (10.0, 5.0, 0.5)]:
        for _ in range(20):
            x = scale * torch.randn(made.dim, dtype=torch.float64)
            g = made.gradient(x)
            after = x - t * made.gradient(x + rho * g / g.norm())
            bound = made.f(x) - t * (1 - (1 + a) * made.L * t / 2) * g.norm() ** 2 + (1 + 1 / a) * made.L**3 * (t * rho) ** 2 / 2
            assert made.f(after) <= bound + rounding_of(made, x, after)


@pytest.mark.parametrize(("problem", "nu"), [("log", 0.3), ("log", 0.9), ("quadratic", 0.9), ("quadratic", 3.0)])
@pytest.mark.parametrize("share", [0.1, 0.9, 0.999])
def test_a_step_of_usam_descends_up_to_the_derived_length(problem: str, nu: float, share: float) -> None:
    """f(x⁺) ≤ f - t m G², m = min{(1 - ν)(1 - L t (1 - ν)/2), (1 + ν)(1 - L t (1 + ν)/2)}; convex f: min{1 - L t/2, the second}."""
    made = PROBLEMS[problem]
    t = share * 2 / (made.L * (1 + nu))
    least = 1 - made.L * t / 2 if problem == "quadratic" else (1 - nu) * (1 - made.L * t * (1 - nu) / 2)
    m = min(least, (1 + nu) * (1 - made.L * t * (1 + nu) / 2))
    assert m > 0
    for scale in (0.01, 0.1, 1.0, 10.0):
        for _ in range(10):
            x = scale * torch.randn(made.dim, dtype=torch.float64)
            g = made.gradient(x)
            after = x - t * made.gradient(x + nu / made.L * g)
            assert made.f(after) <= made.f(x) - t * m * g.norm() ** 2 + rounding_of(made, x, after)


@pytest.mark.parametrize("normalised", [True, False], ids=["sam", "usam"])
def test_the_distance_from_a_minimiser_of_a_convex_function(normalised: bool) -> None:
    """SAM: ‖x⁺ - x*‖² ≤ (1 + 2 t L ρ) ‖x - x*‖² + t² ‖g‖² + ...; that which makes (5) follow from Σ t ρ < ∞, or from descent."""
    made, t, rho = PROBLEMS["quadratic"], 0.7, 0.2
    for scale in (0.01, 0.1, 1.0, 10.0):
        for _ in range(10):
            x = scale * torch.randn(made.dim, dtype=torch.float64)  # x* = 0
            g = made.gradient(x)
            e = rho * g / g.norm() if normalised else rho * g
            h = made.gradient(x + e)
            error = made.L * rho * x.norm() if normalised else rho * h.norm() * g.norm()
            gap = made.f(x) if normalised else made.f(x + e)
            bound = x.norm() ** 2 - 2 * t * (gap - error) + t**2 * h.norm() ** 2
            after = x - t * h
            assert after.norm() ** 2 <= bound * (1 + 100 * EPS)


# --- counterexamples: the five properties fail, as the gradient stays where it is and x_k goes nowhere, or to and fro ---


def stays(function: Any, steps: Law, radii: Law, start: float, least: float, *, normalised: bool = True, count: int = 300) -> list[float]:
    """x_k of the library's optimizer, whose gradients never are shorter than ``least``; the formula's neither, for 40,000 steps."""
    xs = [
        x.item() for x in by_the_library(function, steps, radii, count, torch.tensor([start], dtype=torch.float64), normalised=normalised)
    ]
    long = run(function, steps, radii, STEPS, normalised=normalised, start=start)
    assert min(abs(function.df(x)) for x in xs + long) >= least
    return xs


def made(f: Callable[[float], float], df: Callable[[float], float], L: float) -> Function:
    return Function(f, df, L, 0.0, 0.0)


def test_summable_steps_stop_short() -> None:
    result = theory.admissible((0.5, 1.5), (0.1, 1), 1, convex=True, minimisers="unique")
    assert "f = a x²/2 with a small a" in (result.counterexample or "")
    quadratic = made(lambda x: 0.1 * x * x, lambda x: 0.2 * x, 0.2)
    for normalised in (True, False):
        stays(quadratic, (0.5, 1.5), (0.1, 1.0), 10.0, 1.0, normalised=normalised)


@pytest.mark.parametrize("radii", [(0.1, 0.0), (0.1, 0.5), (0.1, 2.0)])
@pytest.mark.parametrize("normalised", [True, False], ids=["sam", "usam"])
def test_steps_that_are_too_long_go_to_and_fro(radii: Law, normalised: bool) -> None:
    for t in (2.0, 2.5, 2 / (1 + radii[0]) if radii[1] == 0 and not normalised else 3.0):
        result = theory.admissible(t, radii, 1, normalised=normalised, convex=True)
        assert "f = L x²/2 for |x| ≤ 1, L (|x| - 1/2) beyond, from x = c L/2" in (result.counterexample or "")
        function = made(huber, lambda x: max(-1.0, min(1.0, x)), 1.0)
        xs = stays(function, (t, 0.0), radii, t / 2, 0.9, normalised=normalised)
        assert xs[1:] == pytest.approx([-x for x in xs[:-1]], rel=1e-12)


@pytest.mark.parametrize("L", [1.0, 3.0])
def test_constant_steps_and_a_constant_radius_end_in_a_cycle(L: float) -> None:
    """The example that the paper begins with: x² with constant steps."""
    c, C = 0.2, 0.1
    result = theory.admissible(c, C, L, convex=True, minimisers="unique", kl_exponent=0.5)
    assert "f = a x²/2 with a ≤ L and a < 2/c: x_k ends in a cycle" in (result.counterexample or "")
    cycle = c * L * C / (2 - c * L)
    quadratic = made(lambda x: L * x * x / 2, lambda x: L * x, L)
    stays(quadratic, (c, 0.0), (C, 0.0), cycle, L * cycle * (1 - 1e-9))
    assert [abs(x) for x in run(quadratic, (c, 0.0), (C, 0.0), STEPS, start=1.0)[-100:]] == pytest.approx([cycle] * 100)
    # Either of the two that decreases breaks the cycle.
    for steps, radii in (((c, 0.5), (C, 0.0)), ((c, 0.0), (C, 0.5))):
        assert abs(run(quadratic, steps, radii, STEPS, start=1.0)[-1]) < 0.02 * cycle


@pytest.mark.parametrize("steps", [(1.0, 1.0), (0.1, 0.5)])
@pytest.mark.parametrize("C", [0.01, 0.5, 8.0])
def test_a_constant_radius_holds_x_where_the_ascent_meets_a_maximiser(steps: Law, C: float) -> None:
    L = 2.0
    result = theory.admissible(steps, C, L, kl_exponent=0.5)
    assert "f = L C² cos(x/C) from x = C" in (result.counterexample or "")
    wave = made(lambda x: L * C**2 * math.cos(x / C), lambda x: -L * C * math.sin(x / C), L)
    xs = stays(wave, steps, (C, 0.0), C, 0.8 * L * C, count=50)
    assert xs == pytest.approx([C] * 50, rel=1e-6)  # an unstable point: the optimizer's norm_eps grows a little


def test_a_long_constant_radius_holds_all_x_nearby() -> None:
    """Not at one point alone: with ρ = 4 on cos x the ascent from around 4 - π meets the minimiser -π. (See arXiv 2509.21818.)"""
    wave = made(math.cos, lambda x: -math.sin(x), 1.0)
    for start in (0.6, 0.9, 1.2):
        xs = stays(wave, (1.0, 0.6), (4.0, 0.0), start, 0.5)
        assert xs[-1] == pytest.approx(4 - math.pi, abs=1e-6)
    assert abs(math.sin(run(wave, (1.0, 0.6), (4.0, 0.5), STEPS, start=0.9)[-1])) < 1e-3  # a radius that decreases lets go


@pytest.mark.parametrize(("C", "L"), [(0.5, 2.0), (0.5, 10.0), (2.0, 0.5)])
def test_usam_with_nu_1_holds_x_where_the_ascent_meets_a_maximiser(C: float, L: float) -> None:
    """-x²/(2 C) between -1 and 1, and parabolas upwards around ±2."""
    result = theory.admissible((0.1, 0.5), C, L, normalised=False)
    assert "f = -x²/(2 C) for |x| ≤ 1" in (result.counterexample or "")
    wells = made(
        lambda x: -x * x / (2 * C) if abs(x) <= 1 else (abs(x) - 2) ** 2 / (2 * C) - 1 / C,
        lambda x: -x / C if abs(x) <= 1 else (x - math.copysign(2.0, x)) / C,
        1 / C,
    )
    assert stays(wells, (0.1, 0.5), (C, 0.0), 0.5, 0.5 / C, normalised=False, count=50) == [0.5] * 50
    assert abs(wells.df(run(wells, (0.1, 0.5), (0.9 * C, 0.0), STEPS, normalised=False, start=0.5)[-1])) < 1e-6  # ν < 1 lets go
