"""Radii and mixes that are functions of the step t = 1, 2, … alone.

Each is called with t: an int, or with ``capturable=True`` a () float64 tensor, out of which it makes another without a look at it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sam_kernels._validate import check_count, check_number
from sam_kernels.schedules._at_step import Step, almost_constant

__all__ = ["AlmostConstantRadius", "DecreasingRadius", "LinearLambda", "LinearRadius"]


@dataclass(frozen=True)
class AlmostConstantRadius:
    """ρ_t = C / t^p. arXiv 2401.08060; the string ``'C/k^p'`` is the same.

    Without convexity Σ lr_t ρ_t < ∞ is asked for: p > 0 is enough for lr_t = lr_0 / t. p = 0.001 leaves 98.6 % of C after 10⁶ steps.

    Args:
        C: radius of the first step, ≥ 0.
        p: ≥ 0.

    Raises:
        TypeError, ValueError: for what is no such number.
    """

    C: float
    p: float = 0.001

    def __post_init__(self) -> None:
        check_number("AlmostConstantRadius", "C", self.C, low=0.0)
        check_number("AlmostConstantRadius", "p", self.p, low=0.0)

    def __call__(self, t: Step) -> float | Tensor:
        return almost_constant(self.C, self.p, t)


@dataclass(frozen=True)
class DecreasingRadius:
    """ρ_t = min{ρ_max, 1 / (2 t - 1)}: converges on μ-PL functions, with the learning rates of :class:`PLDecreasing`.

    arXiv 2503.02225, section 3, where t counts from 0: 1 / (2 t + 1).

    Args:
        rho_max: ρ_max ≥ 0: the ρ of :func:`sam_kernels.theory.pl_constant_steps`, or less.

    Raises:
        TypeError, ValueError: for what is no such number.
    """

    rho_max: float

    def __post_init__(self) -> None:
        check_number("DecreasingRadius", "rho_max", self.rho_max, low=0.0)

    def __call__(self, t: Step) -> float | Tensor:
        radius = 1 / (2 * t - 1)
        return radius.clamp(max=self.rho_max) if isinstance(radius, Tensor) else min(self.rho_max, radius)


@dataclass(frozen=True)
class LinearRadius:
    """ρ_t from ``first`` at t = 1 to ``last`` at t = steps + 1 and from there on, linearly: a radius that is warmed up or faded out.

    Args:
        first, last: ≥ 0. (In steps with ρ_t = 0 the closure runs once.)
        steps: ≥ 1.

    Raises:
        TypeError, ValueError: for what is none of these.
    """

    first: float
    last: float
    steps: int

    def __post_init__(self) -> None:
        _check_linear("LinearRadius", self.first, self.last, self.steps, high=None)

    def __call__(self, t: Step) -> float | Tensor:
        return _linear(self.first, self.last, self.steps, t)


@dataclass(frozen=True)
class LinearLambda:
    """λ_t from ``first`` at t = 1 to ``last`` at t = steps + 1 and from there on, linearly: from SAM (1) to USAM (0), or back.

    Args:
        first, last: in [0, 1].
        steps: ≥ 1.

    Raises:
        TypeError, ValueError: for what is none of these.
    """

    first: float
    last: float
    steps: int

    def __post_init__(self) -> None:
        _check_linear("LinearLambda", self.first, self.last, self.steps, high=1.0)

    def __call__(self, t: Step) -> float | Tensor:
        return _linear(self.first, self.last, self.steps, t)


def _check_linear(op: str, first: float, last: float, steps: int, *, high: float | None) -> None:
    check_number(op, "first", first, low=0.0, high=high)
    check_number(op, "last", last, low=0.0, high=high)
    check_count(op, "steps", steps, low=1)


def _linear(first: float, last: float, steps: int, t: Step) -> float | Tensor:
    way = (t - 1) / steps
    way = way.clamp(max=1.0) if isinstance(way, Tensor) else min(1.0, way)
    return first * (1 - way) + last * way  # exact at both ends, never beyond them
