r"""Step sizes and bounds that are proved for Unified SAM under arbitrary sampling. Plain functions of numbers.

Notation: f = (1/n) Σ f_i; f_i has smoothness L_i (its gradient is L_i-Lipschitz) and infimum f_i,inf; one draw S of a sampling gives the
objective f_S, unbiased, as :mod:`sam_kernels.sampling` weights it, and its gradient g = ∇f_S. The step is
x⁺ = x - γ ∇f_S(x + ρ (1 - λ + λ / ‖g‖) g), γ the learning rate. u = (1 - λ)². Expected residual: E‖g‖² ≤ 2 A (f - f_inf) + B ‖∇f‖² + C.

``L`` in the step sizes and bounds is a smoothness constant of f_S for *every* draw S, and so of f: :func:`sampled_smoothness`, or anything
larger. (The paper takes L_max. That is enough for tau-nice, uniform and importance sampling; with other probabilities the weights
1 / (n p_i) can make f_S less smooth than any f_i.) μ-PL: ‖∇f‖² ≥ 2 μ (f - f*).

Sources: Unified SAM, Oikonomou and Loizou, ICLR 2025, arXiv 2503.02225; conditions of descent: Khanh, Luong, Mordukhovich, Tran, NeurIPS
2024, arXiv 2401.08060. "Derived": from their assumptions, with constants of this package, each checked by its tests.

All functions raise TypeError or ValueError for arguments of the wrong type or out of range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sam_kernels._validate import check_choice, check_count, check_number, check_probabilities, check_vector

__all__ = [
    "descent_step",
    "expected_residual",
    "nonconvex_bound",
    "nonconvex_steps",
    "pl_bound",
    "pl_constant_steps",
    "pl_decreasing_steps",
    "pl_floor",
    "pl_largest_rho",
    "residual_constant",
    "sampled_smoothness",
]

_ROUNDING = 2.0**-26  # relative, of constants that were computed: eigenvalues, say
SAMPLINGS = ("tau_nice", "full", "single", "uniform", "importance", "with_replacement", "independent")


def expected_residual(
    sampling: str,
    *,
    n: int,
    L: float | Tensor | Sequence[float],  # (n,) or one for all
    tau: int | None = None,
    probabilities: Tensor | Sequence[float] | None = None,  # (n,)
) -> tuple[float, float]:
    """(A, B) of the expected residual E‖g‖² ≤ 2 A (f - f_inf) + B ‖∇f‖² + C; C is :func:`residual_constant`. arXiv 2503.02225, section 3.

    ============================  ==========================================  ===================
    sampling                      A                                           B
    ============================  ==========================================  ===================
    ``"tau_nice"`` (tau)          (n - τ) L_max / (τ (n - 1))                 n (τ - 1) / (τ (n - 1))
    ``"full"``                    0                                           1
    ``"single"`` (probabilities)  max_i L_i / (n p_i)                         0
    ``"uniform"``                 L_max                                       0
    ``"importance"``              mean_i L_i (p_i = L_i / ΣL)                 0
    ``"with_replacement"`` (tau)  max_i L_i / (τ n p_i)                       1 - 1/τ
    ``"independent"``             max_i (1 - p_i) L_i / (n p_i) (derived)     1
    ============================  ==========================================  ===================

    Independent sampling: Σ_{i in S} ∇f_i / (n p_i) has the variance Σ_i (1 - p_i) ‖∇f_i‖² / (n² p_i), and ‖∇f_i‖² ≤ 2 L_i (f_i - f_i,inf).

    Args:
        sampling: one of these.
        n: the number of samples.
        L: L_i > 0 of every sample, or one number for all.
        tau: the size of a batch, for the two samplings that have one.
        probabilities: p_i > 0, for ``"single"`` and ``"independent"``; for ``"with_replacement"`` too, uniform where it is None.
    """
    name = "expected_residual"
    smoothness, p, tau = _sampling(name, sampling, n, L, tau, probabilities)
    if sampling == "full" or (n == 1 and sampling == "tau_nice"):
        return 0.0, 1.0
    if sampling == "tau_nice":
        return (n - tau) * smoothness.max().item() / (tau * (n - 1)), n * (tau - 1) / (tau * (n - 1))
    if sampling == "independent":
        return ((1 - p) * smoothness / (n * p)).max().item(), 1.0
    return (smoothness / (n * p)).max().item() / tau, 1 - 1 / tau


def sampled_smoothness(
    sampling: str,
    *,
    n: int,
    L: float | Tensor | Sequence[float],  # (n,) or one for all
    tau: int | None = None,
    probabilities: Tensor | Sequence[float] | None = None,  # (n,)
) -> float:
    """The smoothness that f_S has for every draw S, derived from that of sums: what ``L`` may be in step sizes and bounds.

    tau-nice: the mean of the τ largest L_i; full: the mean of all; independent: Σ L_i / (n p_i), where everything is drawn; all others:
    max_i L_i / (n p_i), which is L_max for uniform and the mean of the L_i for importance sampling. Arguments as for
    :func:`expected_residual`.
    """
    smoothness, p, tau = _sampling("sampled_smoothness", sampling, n, L, tau, probabilities)
    if sampling in ("tau_nice", "full"):
        return smoothness.topk(tau if sampling == "tau_nice" else n).values.mean().item()
    weighted = smoothness / (n * p)
    return (weighted.sum() if sampling == "independent" else weighted.max()).item()


def residual_constant(A: float, f_inf: float, mean_f_i_inf: float) -> float:
    """C = 2 A (f_inf - mean_i f_i,inf) of the expected residual: 0 where one point minimises every f_i. arXiv 2503.02225.

    Args:
        A: ≥ 0, of :func:`expected_residual`.
        f_inf, mean_f_i_inf: the infimum of f, and the mean of those of the f_i, which is no larger. (Where it is so by four times the
            eps of float64, that is rounding, and counts as equal.)
    """
    name = "residual_constant"
    (A,) = _checked(name, A=A)
    f_inf, mean = check_number(name, "f_inf", f_inf), check_number(name, "mean_f_i_inf", mean_f_i_inf)
    if mean > f_inf + 4 * torch.finfo(torch.float64).eps * max(abs(f_inf), abs(mean)):
        check_number(name, "mean_f_i_inf", mean, high=f_inf)
    return 2 * A * max(0.0, f_inf - mean)


def pl_largest_rho(mu: float, L: float, A: float, B: float, lambd: float) -> float:
    """ρ* = μ / (L (μ + 2 (B μ + A) u)), below which there are learning rates for μ-PL functions. arXiv 2503.02225."""
    mu, L, noise, u = _pl("pl_largest_rho", mu, L, A, B, lambd)
    return mu / (L * (mu + 2 * noise * u))


def pl_constant_steps(mu: float, L: float, A: float, B: float, lambd: float, form: int = 1) -> tuple[float, float]:
    """Constant (ρ, γ) for a μ-PL function, with which :func:`pl_bound` holds; so it does with a smaller ρ, and with a smaller γ.

    Form 1: ρ = ρ* / 2 (:func:`pl_largest_rho`), γ = [μ - L ρ (μ + 2 (B μ + A) u)] / [2 L (B μ + A) (2 L² ρ² u + 1)].
    Form 2: ρ = min{1, μ / (2 (B μ + A) u)} / (4 L), γ = min{2, μ / (8 (B μ + A))} / L. arXiv 2503.02225, section 3.

    Args:
        mu: μ in (0, L]; no L-smooth function has a larger one.
        L: of every f_S, see above.
        A, B: of :func:`expected_residual`, not both 0.
        lambd: λ in [0, 1].
        form: 1 or 2.
    """
    name = "pl_constant_steps"
    form = check_count(name, "form", form, low=1, high=2)
    mu, L, noise, u = _pl(name, mu, L, A, B, lambd)
    if form == 2:
        return min(1.0, _over(mu, 2 * noise * u)) / (4 * L), min(2.0, mu / (8 * noise)) / L
    rho = mu / (L * (mu + 2 * noise * u)) / 2
    return rho, (mu - L * rho * (mu + 2 * noise * u)) / (2 * L * noise * (2 * (L * rho) ** 2 * u + 1))


def pl_decreasing_steps(t: int, mu: float, L: float, A: float, B: float, lambd: float) -> tuple[float, float]:
    """(ρ_t, γ_t) = (min{ρ, 1 / (2 t + 1)}, min{γ, (2 t + 1) / ((t + 1)² μ)}) at step t = 0, 1, …: these converge to the minimum of a μ-PL
    function. ρ, γ: form 1 of :func:`pl_constant_steps`, whose γ is admissible with every smaller ρ. arXiv 2503.02225, section 3.
    """
    t = check_count("pl_decreasing_steps", "t", t, low=0)
    rho, gamma = pl_constant_steps(mu, L, A, B, lambd)
    return min(rho, 1 / (2 * t + 1)), min(gamma, (2 * t + 1) / ((t + 1) ** 2 * mu))


def pl_floor(mu: float, L: float, C: float, lambd: float, rho: float, gamma: float) -> float:
    """(L / μ) {C [ρ u + γ (1 + 2 L² ρ² u)] + ρ λ² (1 + 2 L² γ ρ)}, where :func:`pl_bound` ends. Derived; arguments as there."""
    mu, L, C, lambd, rho, gamma = _pl_steps("pl_floor", mu, L, C, lambd, rho, gamma)
    u = (1 - lambd) ** 2
    return L / mu * (C * (rho * u + gamma * (1 + 2 * (L * rho) ** 2 * u)) + rho * lambd**2 * (1 + 2 * L**2 * gamma * rho))


def pl_bound(t: int, gap: float, mu: float, L: float, C: float, lambd: float, rho: float, gamma: float) -> float:
    """E[f(x_t) - f*] ≤ (1 - γ μ)^t (f(x_0) - f*) + :func:`pl_floor` for a μ-PL function. Derived, after arXiv 2503.02225, section 3.

    Args:
        t: steps made.
        gap: f(x_0) - f* ≥ 0.
        mu, L, lambd: as for :func:`pl_constant_steps`; γ μ ≤ 1.
        C: of :func:`residual_constant`.
        rho, gamma: those steps, or smaller ones. (Larger ones, for which nothing is proved, are not told apart here.)
    """
    name = "pl_bound"
    t = check_count(name, "t", t, low=0)
    (gap,) = _checked(name, gap=gap)
    mu, L, C, lambd, rho, gamma = _pl_steps(name, mu, L, C, lambd, rho, gamma)
    return max(0.0, 1 - gamma * mu) ** t * gap + pl_floor(mu, L, C, lambd, rho, gamma)


def nonconvex_steps(T: int, L: float, A: float, B: float, lambd: float) -> tuple[float, float]:
    """Constant (ρ, γ) for T steps on a smooth function, with which :func:`nonconvex_bound` holds and is O(1 / √T).

    Admissible is L ρ ≤ 1/4, L ρ u B ≤ 1/8, L γ B ≤ 2/9 and γ L ρ u + L γ² (1 + 2 L² ρ² u) ≤ 1 / (2 A T) (derived, after arXiv 2503.02225).
    With s = √(L / (2 A T)) that is so for γ = min{2 / (9 B), 2 s / 3, 1} / L and ρ = min{1/4, 1 / (8 u B), 3 s / 4, 1 / √T} / L: each of
    the two terms of the last condition is half of it at most. (1 and 1 / √T are for A = 0, where it is void.)

    Args:
        T: the number of steps, ≥ 1.
        L, A, B, lambd: as for :func:`pl_constant_steps`.
    """
    name = "nonconvex_steps"
    T = check_count(name, "T", T, low=1)
    L, A, B, lambd = _checked(name, L=L, A=A, B=B, lambd=lambd)
    u, s = (1 - lambd) ** 2, math.sqrt(_over(L, 2 * A * T))
    rho = min(0.25, _over(1, 8 * u * B), 0.75 * s, 1 / math.sqrt(T)) / L
    return rho, min(_over(2, 9 * B), 2 * s / 3, 1.0) / L


def nonconvex_bound(T: int, gap: float, L: float, C: float, lambd: float, rho: float, gamma: float) -> float:
    """min_{t < T} E‖∇f(x_t)‖² ≤ 6 (f(x_0) - f_inf) / (γ T) + 2 C (L ρ u + 9 L γ / 8) + 2 L ρ λ² + 4 L³ γ ρ² λ². Derived.

    For admissible steps, those of :func:`nonconvex_steps` among them. ``gap`` is f(x_0) - f_inf; the others as for :func:`pl_bound`.
    """
    name = "nonconvex_bound"
    T = check_count(name, "T", T, low=1)
    gap, L, C, lambd, rho, gamma = _checked(name, gap=gap, L=L, C=C, lambd=lambd, rho=rho, gamma=gamma)
    noise = 2 * C * (L * rho * (1 - lambd) ** 2 + 9 * L * gamma / 8)
    return 6 * gap / (gamma * T) + noise + 2 * L * rho * lambd**2 + 4 * L**3 * gamma * (rho * lambd) ** 2


def descent_step(L: float, rho: float, delta: float) -> float:
    """The largest learning rate t = (2 - 2 ν - δ) / (L (1 + ν)²), ν = L ρ < 1, at which a step of USAM (or extragradient, the ascent
    downhill) with all the data descends: f(x⁺) ≤ f(x) - (t δ / 2) ‖∇f(x)‖². arXiv 2401.08060.

    Args:
        L: the smoothness of f.
        rho: ρ in [0, 1 / L).
        delta: δ in (0, 2 - 2 ν).
    """
    name = "descent_step"
    (L,) = _checked(name, L=L)
    nu = L * check_number(name, "rho", rho, low=0.0, high=1 / L, open_high=True)
    delta = check_number(name, "delta", delta, low=0.0, high=2 - 2 * nu, open_low=True, open_high=True)
    return (2 - 2 * nu - delta) / (L * (1 + nu) ** 2)


def _sampling(
    name: str, sampling: str, n: int, L: float | Tensor | Sequence[float], tau: int | None, probabilities: Tensor | Sequence[float] | None
) -> tuple[Tensor, Tensor, int]:
    """L_i, p_i and τ in float64, with what a sampling does not say filled in: uniform probabilities, one draw."""
    check_choice(name, "sampling", sampling, SAMPLINGS)
    check_count(name, "n", n, low=1)
    for what, value, needed, allowed in (
        ("tau", tau, ("tau_nice", "with_replacement"), ()),
        ("probabilities", probabilities, ("single", "independent"), ("with_replacement",)),
    ):
        if value is not None and sampling not in (*needed, *allowed):
            raise ValueError(f"{name}: {what} does not go with {sampling!r}")
        if value is None and sampling in needed:
            raise ValueError(f"{name}: {sampling!r} needs {what}")
    is_one = isinstance(L, int | float) or (isinstance(L, Tensor) and L.numel() == 1)
    smoothness = torch.full((n,), check_number(name, "L", L), dtype=torch.float64) if is_one else L
    smoothness = check_vector(name, "L", smoothness, low=0.0, open_low=True)
    p = torch.full((n,), 1 / n, dtype=torch.float64) if sampling != "importance" else smoothness / smoothness.sum()
    if probabilities is not None:
        if sampling == "independent":
            p = check_vector(name, "probabilities", probabilities, low=0.0, open_low=True)
            check_number(name, "the largest of probabilities", p.max().item(), high=1.0)
        else:
            p = check_probabilities(name, "probabilities", probabilities)
    for what, vector in (("L", smoothness), ("probabilities", p)):
        if len(vector) != n:
            raise ValueError(f"{name}: {what} must have n = {n} elements, got {len(vector)}")
    if tau is not None:
        tau = check_count(name, "tau", tau, low=1, high=n if sampling == "tau_nice" else None)
    return smoothness, p, 1 if tau is None else tau


def _checked(name: str, **constants: float) -> list[float]:
    """Return constants of the notation above, checked in their order: at least 0, those that are divided by more than 0, λ at most 1."""
    return [
        check_number(name, key, value, low=0.0, open_low=key in ("mu", "L", "gamma"), high=1.0 if key == "lambd" else None)
        for key, value in constants.items()
    ]


def _pl(name: str, mu: float, L: float, A: float, B: float, lambd: float) -> tuple[float, float, float, float]:
    """μ, L, B μ + A and u."""
    mu, L, A, B, lambd = _checked(name, mu=mu, L=L, A=A, B=B, lambd=lambd)
    _check_curvature(name, mu, L)
    if A == B == 0:
        raise ValueError(f"{name}: A and B must not both be 0")
    return mu, L, B * mu + A, (1 - lambd) ** 2


def _check_curvature(name: str, mu: float, L: float) -> None:
    if mu > L * (1 + _ROUNDING):
        raise ValueError(f"{name}: mu must be at most L, as no L-smooth function is μ-PL with a larger one: got mu = {mu!r}, L = {L!r}")


def _pl_steps(name: str, mu: float, L: float, C: float, lambd: float, rho: float, gamma: float) -> list[float]:
    mu, L, C, lambd, rho, gamma = checked = _checked(name, mu=mu, L=L, C=C, lambd=lambd, rho=rho, gamma=gamma)
    _check_curvature(name, mu, L)
    if gamma * mu > 1 + _ROUNDING:
        raise ValueError(f"{name}: gamma * mu must be at most 1, no larger step is proved to converge: got gamma = {gamma!r}, mu = {mu!r}")
    return checked


def _over(a: float, b: float) -> float:
    """a / b for a > 0, where 0 in the denominator means that there is no limit."""
    return a / b if b else math.inf
