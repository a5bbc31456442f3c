r"""Bounds for Unified SAM on reshuffled data. Derived, in docs/reshuffling.md; notation of :mod:`sam_kernels.theory._unified`.

An epoch cuts the n samples into m = n/τ batches of τ, and makes a step with each. Given the batches before, a batch is biased, so no bound
for fresh draws holds. The batches of an epoch sum to f, though: the epoch is one step of gradient descent of length γ m, with an error of
at most L times the mean distance between where its m gradients are taken and where it began.
"""

from __future__ import annotations

import math
from typing import Any

from sam_kernels._validate import check_choice, check_count
from sam_kernels.theory._unified import _check_curvature, _checked, _over

__all__ = ["reshuffling_bound", "reshuffling_floor", "reshuffling_steps"]

ORDERS = ("random", "any")


def reshuffling_steps(mu: float, L: float, A: float, B: float, lambd: float, batches: int, order: str = "random") -> tuple[float, float]:
    """Constant (ρ, γ) for a μ-PL function on reshuffled data, with which :func:`reshuffling_bound` holds and θ ≥ 1/2.

    With (w₁, w₂) as there and w = max{0, w₁ + w₂ (B - 1)} + w₂ A/μ: ρ = min{1/4, √(9 μ / (128 (1 - λ)(B μ + A)))} / L,
    γ = min{1/m, 1/(5 √(m (m - 1)/2)), √(9/(200 w))} / L. Smaller ones do as well. Derived.

    Args:
        mu, L, A, B, lambd, batches, order: as for :func:`reshuffling_bound`.
    Returns: ρ and γ.
    Raises: TypeError or ValueError for arguments of the wrong type or out of range.
    """
    name = "reshuffling_steps"
    mu, L, A, B, lambd = _checked(name, mu=mu, L=L, A=A, B=B, lambd=lambd)
    _check_curvature(name, mu, L)
    m, w1, w2 = _weights(name, batches, order)
    w = max(0.0, w1 + w2 * (B - 1)) + w2 * A / mu
    rho = min(0.25, math.sqrt(_over(9 * mu, 128 * (1 - lambd) * (B * mu + A)))) / L
    return rho, min(1 / m, _over(1.0, 5 * math.sqrt(m * (m - 1) / 2)), math.sqrt(_over(9.0, 200 * w))) / L


def reshuffling_floor(
    *,
    mu: float,
    L: float,
    A: float,
    B: float,
    C: float,
    lambd: float,
    rho: float,
    gamma: float,
    batches: int,
    order: str = "random",
) -> float:
    """P (a₂ C + ρ² λ) / (2 μ θ), where :func:`reshuffling_bound` ends: of order γ² + ρ². Derived; arguments and errors as there."""
    return _epoch("reshuffling_floor", mu, L, A, B, C, lambd, rho, gamma, batches, order)[1]


def reshuffling_bound(
    epochs: int,
    gap: float,
    *,
    mu: float,
    L: float,
    A: float,
    B: float,
    C: float,
    lambd: float,
    rho: float,
    gamma: float,
    batches: int,
    order: str = "random",
) -> float:
    """E[f(x) - f*] ≤ (1 - γ m μ θ)^epochs (f(x_0) - f*) + :func:`reshuffling_floor` for a μ-PL function, at the *end* of epochs. Derived.

    ν = L ρ (1 - λ), s = √(m (m - 1)/2), κ = 1 / (1 - (1 + ν) L γ s), P = 2 κ² L² (κ² L² where ρ = 0 or m = 1), and

    ============  =======================  ==============
    order         w₁                       w₂
    ============  =======================  ==============
    ``"random"``  (m - 1)(2 m - 1)/6       (m + 1)/6
    ``"any"``     (m - 1)(2 m - 1)/3       (m² - 1)/3
    ============  =======================  ==============

    (both 0 where m = 1); a₁ = max{0, (1 + ν)² γ² (w₁ + w₂ (B - 1)) + ρ² (1 - λ) B}, a₂ = (1 + ν)² γ² w₂ + ρ² (1 - λ),
    θ = 1 - P (a₁ + a₂ A/μ). Admissible is L γ m ≤ 1, (1 + ν) L γ s < 1 and θ > 0: :func:`reshuffling_steps` are.

    Args:
        epochs: ≥ 0.
        gap: f(x_0) - f* ≥ 0.
        mu: μ in (0, L].
        L: the smoothness of f_S for every batch S that can come: ``sampled_smoothness("tau_nice", ...)``.
        A, B, C: of the expected residual of one batch. ``"random"``: ``expected_residual("tau_nice", ...)``. ``"any"``: of a uniform draw
            from the m batches of the epoch; A = L, B = 0 and C = 2 L (f* - mean f_S,inf) always hold.
        lambd: λ in [0, 1].
        rho, gamma: constant, ρ ≥ 0, γ > 0.
        batches: m, all of the same size. The bound does not hold with a smaller last batch, nor where ``drop_last`` leaves samples out.
        order: ``"random"``, every epoch cuts a fresh, uniformly random permutation; ``"any"``, the order of the epochs is given, once
            shuffled for all of them, say: then there is nothing random, and E is void.
    Returns: the bound.
    Raises: TypeError or ValueError for arguments of the wrong type or out of range, and for steps that are not admissible.
    """
    name = "reshuffling_bound"
    epochs = check_count(name, "epochs", epochs, low=0)
    (gap,) = _checked(name, gap=gap)
    share, floor = _epoch(name, mu, L, A, B, C, lambd, rho, gamma, batches, order)
    return (1 - share) ** epochs * gap + floor


def _epoch(name: str, *constants: Any) -> tuple[float, float]:
    """γ m μ θ and the floor."""
    *numbers, batches, order = constants
    mu, L, A, B, C, lambd, rho, gamma = _checked(
        name, **dict(zip(("mu", "L", "A", "B", "C", "lambd", "rho", "gamma"), numbers, strict=True))
    )
    _check_curvature(name, mu, L)
    m, w1, w2 = _weights(name, batches, order)
    rise = 1 + L * rho * (1 - lambd)  # 1 + ν
    drift = rise * L * gamma * math.sqrt(m * (m - 1) / 2)
    if L * gamma * m > 1 + 2.0**-26 or drift >= 1:
        raise ValueError(
            f"{name}: L * gamma * batches must be at most 1, and (1 + L rho (1 - lambd)) L gamma √(m (m - 1)/2) less than 1, got "
            f"{L * gamma * m:.4g} and {drift:.4g}; take a smaller gamma, as of reshuffling_steps"
        )
    P = (1 if rho == 0 or m == 1 else 2) * (L / (1 - drift)) ** 2
    a1 = max(0.0, (rise * gamma) ** 2 * (w1 + w2 * (B - 1)) + rho**2 * (1 - lambd) * B)
    a2 = (rise * gamma) ** 2 * w2 + rho**2 * (1 - lambd)
    theta = 1 - P * (a1 + a2 * A / mu)
    if theta <= 0:
        raise ValueError(
            f"{name}: nothing is proved for steps this long: theta must be more than 0, got {theta:.4g} with rho = {rho!r}, "
            f"gamma = {gamma!r}; take smaller ones, as of reshuffling_steps"
        )
    return gamma * m * mu * theta, P * (a2 * C + rho**2 * lambd) / (2 * mu * theta)


def _weights(name: str, batches: int, order: str) -> tuple[int, float, float]:
    """m, and (w₁, w₂): the mean over j < m of E‖Σ_{i<j} ∇f_{S_i}‖² is at most w₁ ‖∇f‖² + w₂ σ², σ² the variance of one batch's gradient."""
    m = check_count(name, "batches", batches, low=1)
    check_choice(name, "order", order, ORDERS)
    if m == 1:
        return m, 0.0, 0.0
    if order == "random":
        return m, (m - 1) * (2 * m - 1) / 6, (m + 1) / 6
    return m, (m - 1) * (2 * m - 1) / 3, (m * m - 1) / 3
