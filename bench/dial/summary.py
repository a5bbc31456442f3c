"""What is computed from scores: shares of SAM's gain, epochs of equal time, the radius to try next. Nothing here trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from sam_kernels.cli.train.report import Estimate

__all__ = ["ERRORS", "TRIES", "best", "equal_time_epochs", "gains", "is_a_gain", "next_radius", "share"]

ERRORS = 2.0  # standard errors that SAM's gain must exceed for a share of it to mean something
TRIES = 8  # radii at most, of which three are tried in any case


def gains(scores: Sequence[float], base: Sequence[float], sign: int) -> list[float]:
    """Return how much better than the base's each score is, seed by seed. ``sign``: 1 where more is better, -1 where less is."""
    return [sign * (score - other) for score, other in zip(scores, base, strict=True)]


def is_a_gain(sam_gains: Sequence[float]) -> bool:
    """Whether SAM's mean gain is more than two standard errors. One seed says nothing: False."""
    found = Estimate.of(sam_gains)
    return found.standard_error is not None and found.mean > ERRORS * found.standard_error


def share(method_gains: Sequence[float], sam_gains: Sequence[float]) -> Estimate | None:
    """Return the share of SAM's gain that a method keeps, r = mean(method) / mean(SAM), and its standard error.

    The gains are pairs, one a seed. The error is the ratio estimator's, to first order: that of the mean of method - r SAM, over
    mean(SAM). None where :func:`is_a_gain` is False: the ratio would be one of two numbers that are not known.
    """
    if not is_a_gain(sam_gains):
        return None
    whole = fmean(sam_gains)
    ratio = fmean(method_gains) / whole
    rests = [ours - ratio * sams for ours, sams in zip(method_gains, sam_gains, strict=True)]
    return Estimate(ratio, stdev(rests) / math.sqrt(len(rests)) / whole)


def equal_time_epochs(epochs: int, cost: float, sam_cost: float) -> int:
    """Return the epochs that take as long as ``epochs`` of SAM: epochs * sam_cost / cost, rounded, at least 1. Costs are over the base."""
    return max(1, round(epochs * sam_cost / cost))


def best(scores: Mapping[float, float], sign: int) -> float:
    """Return the radius with the best mean score, the smallest of equals. A score that is not finite is the worst."""
    return max(sorted(scores), key=lambda rho: sign * scores[rho] if math.isfinite(scores[rho]) else -math.inf)


def next_radius(scores: Mapping[float, float], sign: int, start: float) -> float | None:
    """Return the radius to try next: ``start``, half and twice as much, then on past the end of the grid that the best one lies at.

    None where the best lies inside the grid, or eight radii have been tried.
    """
    for rho in (start, start / 2, 2 * start):
        if rho not in scores:
            return rho
    chosen = best(scores, sign)
    if len(scores) >= TRIES:
        return None
    if chosen == max(scores):
        return 2 * chosen
    return chosen / 2 if chosen == min(scores) else None
