"""What a claim is: a statement with a threshold that was fixed before, and the verdict on what was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Bar", "Claim", "Jobs", "Measured", "bar", "difference"]

Jobs = Callable[[Callable[..., Any], Sequence[Mapping[str, Any]]], list[Any]]  # makes runs: function(**job) for each job, in order


@dataclass(frozen=True)
class Bar:
    """One method's result, for the figure."""

    label: str
    mean: float
    standard_error: float | None  # None: one measurement


@dataclass(frozen=True)
class Measured:
    """``effect``: what is compared with the threshold, with its standard error where there are several seeds."""

    effect: float
    standard_error: float | None
    bars: Sequence[Bar]
    settings: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "%"  # of the bars
    is_right: bool = True  # False: the results that were timed are not equal


@dataclass(frozen=True)
class Claim:
    """``measure(quick, jobs)`` makes runs by ``jobs``. Times are measured without it, before anything else runs."""

    name: str
    statement: str
    threshold: float
    unit: str  # of the effect
    measure: Callable[[bool, Jobs], Measured]
    is_timed: bool = False

    @property
    def needed(self) -> str:
        return f"≥ {self.threshold:g} {self.unit.removesuffix('s') if self.threshold == 1 else self.unit}"

    def holds(self, found: Measured) -> bool:
        """The effect is at least the threshold; of several seeds, two standard errors above 0 too."""
        sure = found.standard_error is None or found.effect - 2 * found.standard_error > 0
        return found.is_right and math.isfinite(found.effect) and found.effect >= self.threshold and sure


def difference(better: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """The mean of the differences, seed by seed, and its standard error."""
    values = [a - b for a, b in zip(better, base, strict=True)]
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def bar(label: str, values: Sequence[float]) -> Bar:
    return Bar(label, statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)
