"""``theory.admissible``, its logic: each condition at its boundary, infinite sums against sampled ones, inputs, words.

tests/test_admissible_runs.py has the runs of SAM and USAM.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sam_kernels import schedules, theory
from sam_kernels.theory import Admissible, admissible

ROOT = Path(__file__).parents[1]
NONE, ONE, TO_FOUR, TO_FIVE = (), (1,), (1, 2, 3, 4), (1, 2, 3, 4, 5)
JUST_ABOVE = 1e-9


def usam(steps: Any, radii: Any, L: float | None, **options: Any) -> Admissible:
    return admissible(steps, radii, L, normalised=False, **options)


def is_violated(result: Admissible, condition: str) -> bool:
    return any(words.startswith(condition) for words in result.violated)


def paper(result: Admissible) -> tuple[int, ...]:
    """What follows by the theorems of the paper alone."""
    return tuple(number for number in result.properties if number not in result.derived)


# --- boundaries ---


def test_the_sum_of_steps_is_infinite_up_to_p_1() -> None:
    at, above = admissible((1, 1), (0.1, 1), 1), admissible((1, 1 + JUST_ABOVE), (0.1, 1), 1)
    assert (at.holds, at.properties, at.violated, at.counterexample) == (True, TO_FOUR, (), None)
    assert (above.holds, above.properties) == (False, NONE)
    assert [words.partition(":")[0] for words in above.violated] == ["Σ t_k = ∞"]
    assert "all steps together do not reach 0" in (above.counterexample or "")
    assert usam((1, 1), 0.1, 1).holds
    assert usam((1, 1 + JUST_ABOVE), 0.1, 1).properties == NONE


@pytest.mark.parametrize(("p", "q"), [(1.0, 0.0), (0.5, 0.5), (0.7, 0.3), (0.999, 0.001), (0.1, 0.9)])
def test_the_sum_of_steps_times_radii_is_finite_above_p_plus_q_1(p: float, q: float) -> None:
    at, above = admissible((1, p), (0.1, q), 1), admissible((1, p), (0.1, q + JUST_ABOVE), 1)
    assert not at.holds
    assert paper(at) == NONE
    assert at.violated == (f"Σ t_k ρ_k < ∞: p + q = 1 is not more than 1, choose q > 1 - p = {1 - p:g}",)
    assert above.holds
    assert paper(above) == TO_FOUR


def test_a_constant_radius_is_below_2_over_l_or_not() -> None:
    below, at = (admissible((1, 1), C, 4.0) for C in (0.5 - 1e-12, 0.5))
    assert not is_violated(below, "lim sup ρ_k")
    assert is_violated(at, "lim sup ρ_k < 2/L: ρ_k = 0.5 for every k, and 2/L = 0.5")
    assert not is_violated(admissible((1, 1), (100.0, 0.001), 4.0), "lim sup ρ_k")
    # Of power laws, the other conditions decide: Σ t_k = ∞ and Σ t_k ρ_k < ∞ leave no radius that does not go to 0.
    assert is_violated(below, "Σ t_k ρ_k")
    assert is_violated(at, "Σ t_k ρ_k")


def test_steps_that_do_not_decrease() -> None:
    constant, decreasing = admissible(0.1, (0.1, 2), 1), admissible((0.1, 1e-6), (0.1, 2), 1)
    assert constant.violated == ("t_k ↓ 0: t_k does not decrease, choose p > 0",)
    assert (constant.properties, constant.derived) == (TO_FOUR, TO_FOUR)
    assert (decreasing.holds, decreasing.derived) == (True, NONE)
    long = admissible(2.0, (0.1, 2), 1)
    assert long.properties == NONE
    assert "leads to -x and back" in (long.counterexample or "")
    assert admissible(2.0 - 1e-12, (0.1, 2), 1).properties == TO_FOUR


def test_convex_squares_of_steps() -> None:
    at, above = (admissible((1, p), 0.1, 1, convex=True) for p in (0.5, 0.5 + JUST_ABOVE))
    assert not at.holds
    assert at.violated == ("Σ t_k² < ∞: 2 p = 1 is not more than 1, choose p > 1/2, or q > 1 - p = 0.5",)
    assert (above.holds, paper(above), above.properties) == (True, ONE, TO_FOUR)
    assert admissible((1, 0.4), (0.1, 0.7), 1, convex=True).holds  # by the theorem for any f
    unique = admissible((1, 0.6), 0.1, 1, convex=True, minimisers="unique")
    assert (unique.holds, paper(unique)) == (True, TO_FIVE)
    assert admissible((1, 0.6), 0.1, 1).properties == NONE


def test_relative_errors_and_nu_1() -> None:
    below, at = (usam((1, 0.5), C, 4.0) for C in (0.25 - 1e-12, 0.25))
    assert (below.holds, paper(below)) == (True, TO_FOUR)
    assert at.violated == ("ν = L ρ_k < 1: ρ_k = 0.25 for every k, and 1/L = 0.25, choose C < 1/L or q > 0",)
    assert at.properties == NONE
    assert "x never moves" in (at.counterexample or "")
    assert usam((1, 0.5), (0.25, JUST_ABOVE), 4.0).holds
    assert (usam((1, 0.5), 1, 2).holds, usam((1, 0.5), 1, 0.5).holds) == (False, True)
    convex = usam((1, 0.5), 0.25, 4.0, convex=True)
    assert (convex.holds, convex.properties, convex.derived) == (False, TO_FIVE, TO_FIVE)


@pytest.mark.parametrize("nu", [0.0, 0.3, 0.9])
def test_relative_errors_and_the_longest_step(nu: float) -> None:
    """The paper's (2 - 2 ν - δ)/(L (1 + ν)²), as ``descent_step`` has it, and the derived 2/(L (1 + ν)), which is exact."""
    L = 2.0
    ends = theory.descent_step(L, nu / L, 1e-13), (2 - 2 * nu) / (L * (1 + nu) ** 2)
    assert [usam(t, nu / L, L).holds for t in ends] == [True, False]
    assert paper(usam(ends[1], nu / L, L)) == NONE
    limit = 2 / (L * (1 + nu))
    below, at = (usam(t, nu / L, L) for t in (limit * (1 - 1e-12), limit))
    assert (below.properties, below.derived) == (TO_FOUR, TO_FOUR if nu else NONE)
    assert (at.properties, at.counterexample is None) == (NONE, False)


def test_a_radius_of_0_is_gradient_descent() -> None:
    for normalised in (True, False):
        result = admissible(1.9, 0, 1, normalised=normalised, kl_exponent=0.5)
        assert (result.holds, paper(result)) == (True, TO_FIVE)
        assert result.question.startswith("gradient descent, t_k = 1.9, ρ_k = 0, any f, KL with exponent 0.5, L = 1")
        long = admissible(2, 0, 1, normalised=normalised)
        assert (long.properties, long.violated) == (
            NONE,
            ("lim sup t_k < 2/L: t_k = 2 for every k, and 2/L = 2, choose less, or p > 0",),
        )
    words = "lim sup t_k < (2 - 2 ν)/(L (1 + ν)²): t_k = 1 for every k, and (2 - 2 ν)/(L (1 + ν)²) = 0.444444, choose less, or p > 0"
    assert usam(1, 0.5, 1).violated == (words,)


def test_an_almost_constant_radius() -> None:
    """C/k^0.001 is enough beside 1/k, and for liminf alone beside anything slower."""
    assert admissible((1, 1), schedules.AlmostConstantRadius(0.1), 1).holds
    slower = admissible((1, 0.5001), "0.1/k^0.001", 1)
    assert (slower.holds, slower.properties, slower.counterexample) == (False, ONE, None)


@pytest.mark.parametrize("exponent", [0.1, 0.5, 0.9])
def test_kl_functions(exponent: float) -> None:
    """The paper's condition on tails for the best exponent below 1, and Σ t_k ρ_k < ∞ alone (derived)."""
    strict, tails = (
        admissible((1, 0.8), (0.1, 0.4), 1, kl_exponent=exponent),
        admissible((1, 0.8), (0.1, 0.4 + 1e-9), 1, kl_exponent=exponent),
    )
    assert (strict.holds, strict.properties, strict.derived) == (True, TO_FIVE, (5,))  # 2 p + q = 2
    assert paper(tails) == TO_FIVE
    assert admissible((1, 1), (0.1, 1e-3), 1, kl_exponent=exponent).derived == NONE
    assert admissible((1, 0.8), (0.1, 0.2), 1, kl_exponent=exponent).properties == TO_FOUR  # p + q = 1
    assert any(each.startswith("(5): f is KL") for each in strict.assumes)


def test_the_tails_of_the_kl_condition_for_one_exponent() -> None:
    """Σ_k t_k (Σ_{i≥k} t_i ρ_i)^e by sampling, for the exponent that is claimed to do: just below 1 there is one wherever 2 p + q > 2."""
    k = torch.arange(1, 2**17 + 1, dtype=torch.float64)
    for p, q in [(0.8, 0.5), (0.9, 0.15), (1.0, 0.01), (0.8, 0.35), (0.7, 0.5), (0.5, 0.95)]:
        tails = k ** (1 - p - q) / (p + q - 1)  # to first order
        best = k**-p * tails**0.999
        assert is_finite(best) == (5 in paper(admissible((1, p), (0.1, q), 1, kl_exponent=0.5))), (p, q)


# --- infinite sums ---


def is_finite(terms: torch.Tensor) -> bool:
    """Whether a sum of a power law is finite: the second half adds less than the second quarter does. Each is 2^(1 - s) times the last."""
    n = len(terms)
    return bool(terms[n // 2 :].sum() < terms[n // 4 : n // 2].sum())


def test_conditions_are_those_of_sampled_sums() -> None:
    """p and q at and around every boundary: what follows, read off the sums of 2^17 terms."""
    k = torch.arange(1, 2**17 + 1, dtype=torch.float64)
    powers = (0.0, 0.001, 0.25, 0.4, 0.5, 0.501, 0.6, 0.75, 0.999, 1.0, 1.001, 1.5), (0.0, 0.001, 0.1, 0.25, 0.3, 0.5, 0.6, 1.0, 1.2)
    for p, q in itertools.product(*powers):
        t, rho = 0.5 / k**p, 0.3 / k**q
        infinite, goes_to_0 = not is_finite(t), q > 0
        general, convex = admissible((0.5, p), (0.3, q), 1), admissible((0.5, p), (0.3, q), 1, convex=True)
        assert is_violated(general, "Σ t_k = ∞") == (not infinite), (p, q)
        assert is_violated(general, "Σ t_k ρ_k < ∞") == (not is_finite(t * rho)), (p, q)
        assert general.holds == (infinite and p > 0 and is_finite(t * rho)), (p, q)
        assert convex.holds == (infinite and (is_finite(t**2) or (p > 0 and is_finite(t * rho)))), (p, q)
        expected = NONE if not infinite else TO_FOUR if is_finite(t * rho**2) else ONE if goes_to_0 else NONE
        assert general.properties == expected, (p, q)
        constant = p == q == 0
        last = TO_FIVE if is_finite(t * rho) else TO_FOUR if is_finite((t * rho) ** 2) else NONE if constant else ONE
        assert convex.properties == (last if infinite else NONE), (p, q)
        bounded = admissible((0.5, p), (0.3, q), 1, convex=True, minimisers="bounded")
        assert bounded.properties == (NONE if not infinite or constant else max(last, TO_FOUR)), (p, q)
        unique = admissible((0.5, p), (0.3, q), 1, convex=True, minimisers="unique")
        assert unique.properties == (NONE if not infinite or constant else TO_FIVE), (p, q)


def test_what_fails_does_not_follow() -> None:
    """A counterexample to all five wherever one is named, and nothing derived beyond a wider class's."""
    values = (0.0, 0.3, 0.6, 1.0, 1.2)
    for p, q, c, C, normalised in itertools.product(values, values, (0.5, 2.5), (0.0, 0.3, 1.5), (True, False)):
        general = admissible((c, p), (C, q), 1, normalised=normalised)
        for options in (
            {"kl_exponent": 0.5},
            {"convex": True},
            {"convex": True, "minimisers": "bounded"},
            {"convex": True, "kl_exponent": 0.5},
        ):
            narrower = admissible((c, p), (C, q), 1, normalised=normalised, **options)
            assert set(general.properties) <= set(narrower.properties)
            assert general.counterexample or not narrower.counterexample
            assert not (narrower.properties and narrower.counterexample)
            assert set(narrower.derived) <= set(narrower.properties)
            assert narrower.properties == tuple(range(1, len(narrower.properties) + 1))  # each is implied by the next one
            assert not narrower.holds or narrower.properties
        for result in (general, admissible((c, p), (C, q), 1, normalised=normalised, convex=True)):
            assert result.holds == (not result.violated)


# --- L that is not known ---


def test_without_l() -> None:
    for L in (None, math.inf, np.inf):
        assert admissible((1, 1), (0.1, 0.001), L).holds
        assert usam((1, 0.5), (10.0, 0.1), L).holds
        relative = usam(0.1, 0.1, L)
        assert not relative.holds
        assert relative.violated == relative.properties == ()
        assert [words.partition(":")[0] for words in relative.undecided] == ["ν = L ρ_k < 1", "lim sup t_k < (2 - 2 ν)/(L (1 + ν)²)"]
        assert "undecided: ν" in str(relative)
        assert relative.counterexample is None
        assert "L is not known: pass it" in admissible((1, 1), 0.1, L).undecided[0]
        constant = admissible(0.1, (0.1, 2), L)
        assert (constant.properties, len(constant.undecided), constant.counterexample) == (NONE, 1, None)
        assert admissible(0.1, 0.1, L, convex=True).counterexample  # whatever L is
        assert usam((1, 1), 0.1, L, convex=True).properties == TO_FIVE
        assert usam((1, 1), 0.1, L).properties == NONE


# --- rates ---


def test_rates() -> None:
    assert usam(0.1, 0.1, 1, kl_exponent=0.75).rates == ("O(k^-2)", "O(k^-0.5)", "O(k^-0.5)")
    assert usam((0.1, 0.5), 0.1, 1, kl_exponent=0.75).rates == ("O(k^-1)", "O(k^-0.25)", "O(k^-0.25)")
    assert usam((0.1, 1), 0.1, 1, kl_exponent=0.75).rates == ("O((ln k)^-2)", "O((ln k)^-0.5)", "O((ln k)^-0.5)")
    for exponent in (0.2, 0.5):
        assert usam(0.1, 0.1, 1, kl_exponent=exponent).rates == ("O(r^k), r < 1",) * 3
        assert usam((0.1, 0.25), 0.1, 1, kl_exponent=exponent).rates == ("O(exp(-a k^0.75)), a > 0",) * 3
        assert usam((0.1, 1), 0.1, 1, kl_exponent=exponent).rates == ("O(k^-a), a > 0",) * 3
    assert admissible(0.1, 0, 1, kl_exponent=0.6).rates == ("O(k^-5)", "O(k^-2)", "O(k^-2)")
    assert usam(0.1, 0.1, 1).rates is None
    assert usam(0.1, 2, 1, kl_exponent=0.75).rates is None
    assert admissible((1, 1), (0.1, 1), 1, kl_exponent=0.75).rates is None  # none is known


# --- inputs ---


def test_inputs_of_every_kind() -> None:
    same = [
        admissible((1, 1), (2, 0.5), 3),
        admissible([1.0, 1.0], "2/k^0.5", 3.0),
        admissible("1/k^1", schedules.AlmostConstantRadius(2, 0.5), np.float32(3)),  # type: ignore[arg-type]
        admissible((torch.tensor(1.0), np.int64(1)), (2.0, torch.tensor(0.5)), torch.tensor(3.0)),  # type: ignore[arg-type]
    ]
    assert all(result == same[0] for result in same)
    assert admissible(1, 2, 3) == admissible((1, 0), (2, 0), 3) == admissible("1", "2", 3)
    assert hash(same[0]) == hash(same[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        same[0].holds = False  # type: ignore[misc]


def scheduler(kind: Callable[..., Any]) -> Any:
    return kind(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: admissible((-1, 1), 0.1, 1), ValueError, r"admissible: c of steps must be a finite number in \[0.0, inf\), got -1"),
        (lambda: admissible(0, 0.1, 1), ValueError, r"admissible: c of steps must be a finite number in \(0.0, inf\), got 0"),
        (lambda: admissible((1, -1), 0.1, 1), ValueError, "admissible: p of steps must be"),
        (lambda: admissible((1, math.nan), 0.1, 1), ValueError, "admissible: p of steps must be a finite number"),
        (lambda: admissible((math.inf, 1), 0.1, 1), ValueError, "admissible: c of steps must be a finite number"),
        (lambda: admissible((1, 1), (-0.1, 1), 1), ValueError, "admissible: C of radii must be"),
        (lambda: admissible((1, 1), (0.1, -1), 1), ValueError, "admissible: q of radii must be"),
        (lambda: admissible((1, 1), (0.1, math.inf), 1), ValueError, "admissible: q of radii must be a finite number"),
        (lambda: admissible((1, 1), 0.1, 0), ValueError, r"admissible: L must be a finite number in \(0.0, inf\), got 0"),
        (lambda: admissible((1, 1), 0.1, -math.inf), ValueError, "admissible: L must be"),
        (lambda: admissible((1, 1), 0.1, math.nan), ValueError, "admissible: L must be"),
        (lambda: admissible((1, 1), 0.1, "1"), TypeError, "admissible: L must be a number, got '1'"),  # type: ignore[arg-type]
        (lambda: admissible((1, 1, 1), 0.1, 1), TypeError, r"steps must be a pair \(c, p\) for c/k\^p, got tuple"),  # type: ignore[arg-type]
        (lambda: admissible(lambda k: 1 / k, 0.1, 1), TypeError, "admissible: steps must be a pair"),  # type: ignore[arg-type]
        (lambda: admissible((1, 1), True, 1), TypeError, r"admissible: radii must be a pair \(C, q\) for C/k\^q, got True"),
        (lambda: admissible(("1", 1), 0.1, 1), TypeError, "admissible: c of steps must be a number, got '1'"),  # type: ignore[arg-type]
        (lambda: admissible(torch.ones(2), 0.1, 1), TypeError, "admissible: steps must be a pair"),  # type: ignore[arg-type]
        (lambda: admissible("1/t", 0.1, 1), ValueError, r"admissible: steps must be \(c, p\) or 'c/k\^p', such as .*got '1/t'"),
        (lambda: admissible(scheduler(schedules.Diminish1), 0.1, 1), TypeError, r"Diminish1 \(lr, 1\), Diminish2 \(lr, exponent\)"),
        (lambda: admissible(schedules.AlmostConstantRadius(1), 0.1, 1), TypeError, "steps must be a pair"),  # type: ignore[arg-type]
        (lambda: admissible((1, 1), 0.1, 1, normalised=1), TypeError, "normalised must be True or False"),  # type: ignore[arg-type]
        (lambda: admissible((1, 1), 0.1, 1, convex=None), TypeError, "convex must be True or False"),  # type: ignore[arg-type]
        (lambda: admissible((1, 1), 0.1, 1, kl_exponent=1), ValueError, r"kl_exponent must be a finite number in \(0.0, 1.0\), got 1"),
        (lambda: admissible((1, 1), 0.1, 1, kl_exponent=0), ValueError, "kl_exponent must be"),
        (
            lambda: admissible((1, 1), 0.1, 1, convex=True, minimisers="one"),
            ValueError,
            "minimisers must be one of 'bounded', 'unique', got",
        ),
        (lambda: admissible((1, 1), 0.1, 1, minimisers="unique"), ValueError, "minimisers goes with convex=True alone; leave it out"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- words ---


def test_the_text_of_a_result() -> None:
    text = str(admissible((1, 0.6), (0.1, 0.3), 2))
    assert text.splitlines()[:3] == [
        "SAM, t_k = 1/k^0.6, ρ_k = 0.1/k^0.3, any f, L = 2: the conditions are violated",
        "  violated:  Σ t_k ρ_k < ∞: p + q = 0.9 is not more than 1, choose q > 1 - p = 0.4",
        "  derived:   (1) lim inf ‖∇f(x_k)‖ = 0",
    ]
    assert "\n  unknown:   (5) x_k → x̄ with ∇f(x̄) = 0\n" in text
    assert "\n  assumes:   (4): x_k has an accumulation point" in text
    held = str(usam((1, 1), 0.1, 2, kl_exponent=0.5))
    assert held.startswith("USAM, t_k = 1/k, ρ_k = 0.1, any f, KL with exponent 0.5, L = 2: the conditions hold\n  follows:   (1)")
    assert "\n  rates:     f(x_k) - f(x̄) = O(k^-a), a > 0, ‖∇f(x_k)‖ = " in held
    failed = str(admissible(0.2, 0.1, 3, convex=True, minimisers="unique"))
    assert "convex f with one minimiser, L = 3: the conditions are violated" in failed
    assert "\n  fails:     (1)" in failed
    assert "\n  example:   f = a x²/2" in failed


def test_a_text_has_a_line_for_each_property() -> None:
    for result in (admissible((1, 1), (0.1, 1), 1), admissible(3, 0.1, 1), admissible((1, 0.5), (0.1, 0.1), 1)):
        shown = re.findall(r"^  (\w+): +\((\d)\) .+$", str(result), re.MULTILINE)
        follows = {number for status, number in shown if status in ("follows", "derived")}
        assert [number for _, number in shown] == ["1", "2", "3", "4", "5"]
        assert follows == {str(number) for number in result.properties}


def test_what_is_assumed() -> None:
    """(4) needs an accumulation point, (5) a minimiser or a KL inequality, unless the class of functions has them."""
    accumulates, minimiser, kl = "(4): x_k has an accumulation point", "(5): f has a minimiser", "(5): f is KL at an accumulation point"
    good, one = ((1, 1), (0.1, 1), 1), ((1, 0.5), (0.1, 0.1), 1)

    def assumed(*laws: Any, **options: Any) -> list[str]:
        first, *others = admissible(*laws, **options).assumes
        assert first.startswith("f is bounded below, ∇f is L-Lipschitz")
        return [each.partition(", as where")[0] for each in others]

    assert assumed(*one) == []
    assert assumed(*good) == [accumulates]
    assert assumed(*good, kl_exponent=0.5) == [accumulates, kl]
    assert assumed(*good, convex=True) == [accumulates, minimiser]
    assert assumed(*good, convex=True, kl_exponent=0.5) == [accumulates, f"{minimiser} or f is KL at an accumulation point"]
    for minimisers in ("bounded", "unique"):
        assert assumed(*good, convex=True, minimisers=minimisers, kl_exponent=0.5) == []


def numbers(properties: tuple[int, ...]) -> str:
    """As the table of docs/schedules.md writes them."""
    return {NONE: "none", ONE: "1"}.get(properties, f"1–{len(properties)}")


def test_the_table_of_named_schedules_is_right() -> None:
    page = (ROOT / "docs" / "schedules.md").read_text()
    table = page.partition("<!-- admissible: begin -->")[2].partition("<!-- admissible: end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    assert len(rows) >= 9
    for steps, radii, *shown in rows:
        t, rho = (tuple(float(x) for x in re.findall(r"`\(([^,]+), ([^)]+)\)`", cell)[-1]) for cell in (steps, radii))
        results = [
            admissible(t, rho, 1, kl_exponent=0.5),
            admissible(t, rho, 1, convex=True),
            admissible(t, rho, 1, convex=True, minimisers="unique"),
            usam(t, rho, 1, kl_exponent=0.5),
        ]
        expected = [numbers(r.properties) + ("" if r.holds else " †") if r.properties else "none ×" for r in results]
        assert shown == expected, (steps, radii, expected)
        assert all(r.properties or r.counterexample for r in results)
