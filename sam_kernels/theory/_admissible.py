"""Whether power-law schedules meet the conditions under which SAM and USAM are proved to converge.

Source: Fundamental Convergence Analysis of SAM, Khanh, Luong, Mordukhovich, Tran, NeurIPS 2024, arXiv 2401.08060. "Derived": proved in
docs/convergence.md from the same assumptions. A power law is decided, never sampled: Σ 1/k^s is finite exactly where s > 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from sam_kernels._validate import check_choice, check_flag, check_number, describe, plain_number
from sam_kernels.schedules import AlmostConstantRadius
from sam_kernels.schedules._at_step import power_law
from sam_kernels.theory._verdict import Admissible, Rates, rates_of

__all__ = ["admissible"]

_NAME = "admissible"
PowerLaw = tuple[float, float] | float | str | AlmostConstantRadius
TO_FOUR, TO_FIVE = {1, 2, 3, 4}, {1, 2, 3, 4, 5}


def admissible(
    steps: tuple[float, float] | float | str,
    radii: PowerLaw,
    L: float | None,
    *,
    normalised: bool = True,
    convex: bool = False,
    kl_exponent: float | None = None,
    minimisers: str | None = None,
) -> Admissible:
    r"""Return which conditions of convergence the learning rates t_k = c/k^p and radii ρ_k = C/k^q meet, and what follows from them.

    The method is x_{k+1} = x_k - t_k ∇f(x_k + e_k), k = 1, 2, …, with all the data in every step. ``normalised``: ‖e_k‖ = ρ_k, as in SAM,
    an *absolute* error of the gradient, of at most L ρ_k. Otherwise e_k = ρ_k ∇f(x_k), USAM, a *relative* error of at most ν ‖∇f(x_k)‖,
    ν = L ρ_k. f is bounded below and its gradient is L-Lipschitz.

    The five properties: (1) lim inf ‖∇f(x_k)‖ = 0; (2) every accumulation point is stationary; (3) ∇f(x_k) → 0; (4) f(x_k) → f(x̄) with
    ∇f(x̄) = 0; (5) x_k → x̄ with ∇f(x̄) = 0. Conditions, for the limit of k → ∞ (finitely many steps change no property):

    ==================  ==========================================================  =================================================
    method, class       conditions of arXiv 2401.08060                              what follows
    ==================  ==========================================================  =================================================
    absolute error      Σ t_k = ∞, t_k ↓ 0, Σ t_k ρ_k < ∞, lim sup ρ_k < 2/L        (1) to (3), and (4) where there is an
                                                                                    accumulation point
    the same, KL        besides, Σ t_k (Σ_{i≥k} t_i ρ_i)^exponent < ∞               (5)
    SAM, f convex       Σ t_k = ∞, Σ t_k² < ∞, sup ρ_k < ∞                          (1); (5) where the minimiser is unique
    relative error      Σ t_k = ∞, ν < 1, t_k ≤ (2 - 2 ν - δ)/(L (1 + ν)²), δ > 0   (1) to (3), (4) as above; KL: (5), with rates
    ==================  ==========================================================  =================================================

    Weaker conditions are enough for some properties (derived; ``Admissible.derived``). With Σ t_k = ∞ and lim sup t_k < 2/L:

    * absolute error: (1) where ρ_k → 0; (1) to (4) where Σ t_k ρ_k² < ∞; (5) where Σ t_k ρ_k < ∞ and f is KL, or convex with a minimiser;
    * SAM, f convex: (1) where t_k ρ_k² → 0; (1) to (4) where besides Σ t_k² ρ_k² < ∞ or the set of minimisers is bounded; (5) where
      besides the minimiser is unique;
    * USAM: (1) to (4) where lim sup t_k < 2/(L (1 + ν)), and ν < 1 or f is convex; (5) where besides f is KL, or convex with a minimiser.

    A function that is KL with an exponent is KL with every larger one below 1, and the KL condition is decided for the best of them.
    A property in neither list is *not known* to follow: this is no claim that it fails, unless ``Admissible.counterexample`` names a
    function. For sequences that are no power laws, momentum, mini-batches and other bases than SGD nothing is claimed.

    VaSSO, F-SAM, RSAM, S²-SAM and others have absolute errors too, but ``convex`` is for the gradient's own direction: leave it False for
    them. Extragradient has a relative error; what is derived for convex f, and the counterexamples, are for USAM alone.
    docs/schedules.md has tables of the named schedules and of the methods.

    Args:
        steps: (c, p), c > 0, p ≥ 0; a number is (number, 0); ``'c/k^p'``. With a learning rate that changes once an epoch, p is the same.
        radii: (C, q), C ≥ 0, q ≥ 0; a number, ``'C/k^q'`` or an :class:`~sam_kernels.schedules.AlmostConstantRadius`. C = 0 is gradient
            descent, whatever ``normalised`` is.
        L: Lipschitz constant of the gradient, > 0. None or ``math.inf``: there is one that is not known; conditions that depend on it are
            ``undecided``.
        normalised: True for SAM, False for USAM.
        convex: f is convex.
        kl_exponent: in (0, 1): f is Kurdyka–Łojasiewicz at an accumulation point x̄, ‖∇f(x)‖ ≥ M (f(x) - f(x̄))^exponent where x is near x̄
            and f(x) > f(x̄) is near f(x̄). (1/2: locally μ-PL; 3/4: x⁴. Some write θ = 1 - exponent.) Real-analytic and semi-algebraic
            functions have an exponent everywhere; its value is needed for the rates alone. None: nothing is assumed.
        minimisers: with ``convex``: ``"bounded"``, the set of minimisers is bounded and not empty, or ``"unique"``. None: nothing is
            assumed.

    Returns:
        An :class:`Admissible`; ``str`` of it explains itself.

    Raises:
        TypeError, ValueError: for arguments of another type or out of range, by name; for ``minimisers`` without ``convex``.
    """
    c, p = _power_law("steps", "c", "p", steps)
    C, q = _power_law("radii", "C", "q", radii)
    check_number(_NAME, "c of steps", c, low=0.0, open_low=True)
    L = None if L is None or plain_number(L) == math.inf else check_number(_NAME, "L", L, low=0.0, open_low=True)
    check_flag(_NAME, "normalised", normalised)
    check_flag(_NAME, "convex", convex)
    if kl_exponent is not None:
        kl_exponent = check_number(_NAME, "kl_exponent", kl_exponent, low=0.0, high=1.0, open_low=True, open_high=True)
    if minimisers is not None:
        check_choice(_NAME, "minimisers", minimisers, ("bounded", "unique"))
        if not convex:
            raise ValueError(f"{_NAME}: minimisers goes with convex=True alone; leave it out for other functions")
    case = _Case(c, p, C, q, L, convex, kl_exponent, minimisers)
    if C == 0:
        return _verdict("gradient descent", case, _relative(case), has_rates=True)
    return _verdict("SAM", case, _absolute(case)) if normalised else _verdict("USAM", case, _relative(case), has_rates=True)


@dataclass(frozen=True)
class _Case:
    """The question, checked: t_k = c/k^p, ρ_k = C/k^q, and the class of functions."""

    c: float
    p: float
    C: float
    q: float
    L: float | None
    convex: bool
    kl_exponent: float | None
    minimisers: str | None

    def is_below(self, limit: float | None) -> bool | None:
        """Whether lim sup t_k is below a positive limit, of which None is not known."""
        return True if self.p > 0 else None if limit is None else self.c < limit

    def has_infinite_sum(self) -> bool:
        return self.p <= 1


@dataclass(frozen=True)
class _Condition:
    """A condition of a theorem: whether it is met (None: that depends on L, which is not known), and its words where it is not."""

    met: bool | None
    words: str


@dataclass(frozen=True)
class _Found:
    """Conditions of the paper's theorem, properties by it and by the derived ones, and a counterexample to all five."""

    conditions: list[_Condition]
    paper: set[int]
    derived: set[int]
    counterexample: str | None


def _absolute(case: _Case) -> _Found:
    """SAM: errors of at most L ρ_k."""
    p, q, L = case.p, case.q, case.L
    limit = None if L is None else 2 / L
    summable = _Condition(p + q > 1, f"Σ t_k ρ_k < ∞: p + q = {p + q:g} is not more than 1, choose q > 1 - p = {1 - p:g}")
    radius = _Condition(
        True if q > 0 else None if limit is None else limit > case.C,
        f"lim sup ρ_k < 2/L: ρ_k = {case.C:g} for every k, {_and_the_limit('2/L', limit)}, choose q > 0",
    )
    conditions = [_infinite_sum(case), _Condition(p > 0, "t_k ↓ 0: t_k does not decrease, choose p > 0"), summable, radius]
    paper: set[int] = set()
    if _all_met(conditions):
        paper |= TO_FIVE if case.kl_exponent and 2 * p + q > 2 else TO_FOUR  # exponent · (p + q - 1) > 1 - p, for one below 1
    if case.convex:
        otherwise = f", or q > 1 - p = {1 - p:g}" if p > 0 else ""
        squares = [_infinite_sum(case), _Condition(p > 0.5, f"Σ t_k² < ∞: 2 p = {2 * p:g} is not more than 1, choose p > 1/2{otherwise}")]
        if _all_met(squares):
            paper |= TO_FIVE if case.minimisers == "unique" else {1}
        if not _all_met(conditions):
            conditions = squares
    derived: set[int] = set()
    short = case.is_below(limit)
    if case.has_infinite_sum() and short:
        derived |= {1} if q > 0 else set()
        derived |= TO_FOUR if p + 2 * q > 1 else set()
        derived |= TO_FIVE if p + q > 1 and (case.kl_exponent or case.convex) else set()
        if case.convex and p + q > 0:
            derived |= {1}
            derived |= TO_FOUR if p + q > 0.5 or case.minimisers else set()
            derived |= TO_FIVE if case.minimisers == "unique" else set()
    if case.has_infinite_sum() and short is None and q > 0:
        conditions.append(_Condition(None, "lim sup t_k < 2/L, which is enough for some of the properties: pass L, or choose p > 0"))
    return _Found(conditions, paper, derived, _fails_anyway(case, limit) or _fails_with_a_constant_radius(case))


def _relative(case: _Case) -> _Found:
    """USAM, and gradient descent: errors of at most ν ‖∇f(x_k)‖."""
    L = case.L
    nu = 0.0 if case.q > 0 or case.C == 0 else None if L is None else L * case.C
    is_small = None if nu is None else nu < 1
    paper_limit = None if L is None or nu is None else (2 - 2 * nu) / (L * (1 + nu) ** 2)
    limit = None if L is None or nu is None else 2 / (L * (1 + nu))
    conditions = [
        _infinite_sum(case),
        _Condition(
            is_small,
            f"ν = L ρ_k < 1: ρ_k = {case.C:g} for every k, {_and_the_limit('1/L', None if L is None else 1 / L)}, choose C < 1/L or q > 0",
        ),
    ]
    if is_small is not False:
        bound = "2/L" if nu == 0 else "(2 - 2 ν)/(L (1 + ν)²)"
        words = f"lim sup t_k < {bound}: t_k = {case.c:g} for every k, {_and_the_limit(bound, paper_limit)}, choose less, or p > 0"
        conditions.append(_Condition(case.is_below(paper_limit), words))
    all_five = TO_FIVE if case.kl_exponent else TO_FOUR
    paper = all_five if _all_met(conditions) else set()
    descends = case.has_infinite_sum() and case.is_below(limit) and (is_small or case.convex)
    derived = (TO_FIVE if case.convex else all_five) if descends else set()
    counterexample = _fails_anyway(case, limit)
    if counterexample is None and is_small is False and not case.convex:
        counterexample = (
            f"f = -x²/(2 C) for |x| ≤ 1, and 1/C-smooth and bounded below elsewhere, from x = 1/2: "
            f"x + C f'(x) = 0 is stationary and x never moves (C = {case.C:g})"
        )
    return _Found(conditions, set(paper), set(derived), counterexample)


def _fails_anyway(case: _Case, limit: float | None) -> str | None:
    """Convex functions on which the learning rates are too short, or too long, for either method."""
    if not case.has_infinite_sum():
        return f"f = a x²/2 with a small a ≤ L, from a large x: all steps together do not reach 0, as Σ t_k is finite (p = {case.p:g} > 1)"
    if case.is_below(limit) is False:
        return f"f = L x²/2 for |x| ≤ 1, L (|x| - 1/2) beyond, from x = c L/2: t_k = {case.c:g} leads to -x and back"
    return None


def _fails_with_a_constant_radius(case: _Case) -> str | None:
    """Functions on which SAM stalls away from every stationary point."""
    if case.q > 0:
        return None
    if case.p == 0:
        return "f = a x²/2 with a ≤ L and a < 2/c: x_k ends in a cycle between x and -x, |x| = c a C/(2 - c a)"
    if not case.convex:
        return "f = L C² cos(x/C) from x = C: the ascent ends at the maximiser 0, where the gradient is 0, and x never moves"
    return None


def _infinite_sum(case: _Case) -> _Condition:
    return _Condition(case.has_infinite_sum(), f"Σ t_k = ∞: p = {case.p:g} is more than 1, choose p ≤ 1")


def _and_the_limit(name: str, limit: float | None) -> str:
    return "and L is not known: pass it" if limit is None else f"and {name} = {limit:g}"


def _all_met(conditions: list[_Condition]) -> bool:
    return all(condition.met for condition in conditions)


def _verdict(method: str, case: _Case, found: _Found, *, has_rates: bool = False) -> Admissible:
    follows = found.paper | found.derived
    violated = tuple(condition.words for condition in found.conditions if condition.met is False)
    undecided = tuple(condition.words for condition in found.conditions if condition.met is None)
    rates: Rates | None = rates_of(case.p, case.kl_exponent) if has_rates and case.kl_exponent and 5 in follows else None
    function = "convex f" if case.convex else "any f"
    function += {"bounded": " with a bounded set of minimisers", "unique": " with one minimiser", None: ""}[case.minimisers]
    function += "" if case.kl_exponent is None else f", KL with exponent {case.kl_exponent:g}"
    smoothness = "L not known" if case.L is None else f"L = {case.L:g}"
    return Admissible(
        holds=not violated and not undecided,
        properties=tuple(sorted(follows)),
        derived=tuple(sorted(follows - found.paper)),
        violated=violated,
        undecided=undecided,
        counterexample=found.counterexample,
        assumes=_assumptions(case, follows),
        rates=rates,
        question=f"{method}, t_k = {_law(case.c, case.p)}, ρ_k = {_law(case.C, case.q)}, {function}, {smoothness}",
    )


def _assumptions(case: _Case, follows: set[int]) -> tuple[str, ...]:
    """What the properties need beside the schedules."""
    assumed = ["f is bounded below, ∇f is L-Lipschitz; every step is one of SGD without momentum, with all the data"]
    exists = case.minimisers is not None
    if 4 in follows and not exists:
        assumed.append("(4): x_k has an accumulation point, as where f has bounded level sets")
    if 5 in follows and not exists:
        ways = ["f has a minimiser"] if case.convex else []
        ways += ["f is KL at an accumulation point"] if case.kl_exponent else []
        assumed.append(f"(5): {' or '.join(ways)}")
    return tuple(assumed)


def _law(factor: float, power: float) -> str:
    return f"{factor:g}" if power == 0 or factor == 0 else f"{factor:g}/k" if power == 1 else f"{factor:g}/k^{power:g}"


def _power_law(name: str, factor: str, power: str, value: Any) -> tuple[float, float]:
    """(c, p) of c/k^p, in any of the forms of :func:`admissible`, both checked to be finite and at least 0."""
    value = plain_number(value)
    if isinstance(value, AlmostConstantRadius) and name == "radii":
        value = value.C, value.p
    elif isinstance(value, str):
        parsed = power_law(value)
        if parsed is None:
            raise ValueError(f"{_NAME}: {name} must be ({factor}, {power}) or '{factor}/k^{power}', such as '0.1/k^0.5', got {value!r}")
        value = parsed
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value = value, 0.0
    if isinstance(value, Tensor) or not isinstance(value, Sequence) or len(value) != 2:
        hint = f"{name} must be a pair ({factor}, {power}) for {factor}/k^{power}"
        if isinstance(value, LRScheduler):
            hint += "; of learning rates lr that follow Constant it is (lr, 0), Diminish1 (lr, 1), Diminish2 (lr, exponent)"
        raise TypeError(f"{_NAME}: {hint}, got {describe(value)}")
    a, b = value
    return check_number(_NAME, f"{factor} of {name}", a, low=0.0), check_number(_NAME, f"{power} of {name}", b, low=0.0)
