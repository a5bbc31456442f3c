"""Radii and mixes that are functions of the step t = 1, 2, … alone.

Each is called with t: an int, or with ``capturable=True`` a () float64 tensor, out of which it makes another without a look at it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sam_kernels._validate import check_count, check_number
from sam_kernels.schedules._at_step import Step, almost_constant
from sam_kernels.schedules._radius import between

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
class _Linear:
    """From ``first`` at t = 1 to ``last`` at t = steps + 1, and constant after that."""

    first: float
    last: float
    steps: int
    _high: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        op = type(self).__name__
        check_number(op, "first", self.first, low=0.0, high=self._high)
        check_number(op, "last", self.last, low=0.0, high=self._high)
        check_count(op, "steps", self.steps, low=1)

    def __call__(self, t: Step) -> float | Tensor:
        return between(self.first, self.last, (t - 1) / self.steps)


class LinearRadius(_Linear):
    """ρ_t from ``first`` at t = 1 to ``last`` at t = steps + 1 and from there on, linearly: a radius that is warmed up or faded out.

    Args:
        first, last: ≥ 0. (In steps with ρ_t = 0 the closure runs once.)
        steps: ≥ 1.

    Raises:
        TypeError, ValueError: for what is none of these.
    """


class LinearLambda(_Linear):
    """λ_t from ``first`` at t = 1 to ``last`` at t = steps + 1 and from there on, linearly: from SAM (1) to USAM (0), or back.

    Args:
        first, last: in [0, 1].
        steps: ≥ 1.

    Raises:
        TypeError, ValueError: for what is none of these.
    """

    _high = 1.0
