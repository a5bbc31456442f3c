"""Choosing on some seeds and reporting on others: the radius and the learning rate of every λ, and the λ itself.

Scores are losses (less is better): their logarithms, which makes ratios of differences (kind "ratio"), or percentages (kind "difference").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.linear_models import Floats
from bench.papers.experiment import cut

__all__ = ["MIXES", "SGD", "Chosen", "Mix", "as_shown", "choose", "effects", "of_json", "row_of", "to_json"]

Mix = float | str | None
NEGLIGIBLE = {"ratio": math.log(1.01), "difference": 0.1}  # one percent, a tenth of a percentage point
SGD = None  # no λ: plain SGD, ρ = 0
MIXES: tuple[float | str, ...] = (*(k / 10 for k in range(11)), "1/t", "1-1/t")


@dataclass(frozen=True)
class Chosen:
    """Of one λ: radius and learning rate, the mean score that they were chosen by (less is better), and the scores of other seeds."""

    rho: float
    gamma: float
    tuned: float
    values: Floats  # (seeds,)


def choose(runs: tuple[tuple[Mix, float, float], ...], scores: Floats, tuning: int) -> dict[Mix, Chosen]:
    """For each λ of the runs (λ, ρ, γ) the run with the least mean of the scores (instances, runs) over the first ``tuning`` instances, and
    its scores on the others."""
    means = scores[:tuning].mean(0)
    found: dict[Mix, Chosen] = {}
    for lambd in dict.fromkeys(run[0] for run in runs):
        best = min((k for k, run in enumerate(runs) if run[0] == lambd), key=lambda k: means[k])
        found[lambd] = Chosen(*runs[best][1:], float(means[best]), scores[tuning:, best])
    return found


def to_json(chosen: Mapping[Mix, Chosen]) -> list[dict[str, Any]]:
    return [{"lambd": lambd, **vars(each), "values": each.values.tolist()} for lambd, each in chosen.items()]


def of_json(found: Iterable[Mapping[str, Any]]) -> dict[Mix, Chosen]:
    """What :func:`to_json` was given."""
    return {each["lambd"]: Chosen(each["rho"], each["gamma"], each["tuned"], np.array(each["values"])) for each in found}


def effects(chosen: Mapping[Mix, Chosen]) -> dict[float | str, Floats]:
    """What each λ changes against SGD, instance by instance: (seeds,) each."""
    return {lambd: each.values - chosen[SGD].values for lambd, each in chosen.items() if lambd is not SGD}


def standard_error(values: Floats) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def as_shown(values: Floats, kind: str) -> tuple[float, float]:
    """Mean and standard error: of scores that are logarithms the geometric mean (its error to first order), else of the scores."""
    mean, error = float(values.mean()), standard_error(values)
    return (cut(math.exp(mean)), cut(math.exp(mean) * error)) if kind == "ratio" else (cut(mean), cut(error))


def row_of(chosen: Mapping[Mix, Chosen], kind: str) -> dict[str, Any]:
    """Of one problem and score: λ chosen with its ρ and γ on the tuning seeds, and what came of it and of some others on the rest.

    ``alike`` are those that are not worse by more than two standard errors, or by less than anyone would care for.
    """
    found = effects(chosen)
    best = min(found, key=lambda lambd: chosen[lambd].tuned)
    alike = []
    for lambd, values in found.items():
        difference = values - found[best]
        if lambd == best or float(difference.mean()) <= max(2 * standard_error(difference), NEGLIGIBLE[kind]):
            alike.append(lambd)
    row: dict[str, Any] = {"sgd": as_shown(chosen[SGD].values, kind)[0], "best": best, "rho": chosen[best].rho, "gamma": chosen[best].gamma}
    row |= {"effect": list(as_shown(found[best], kind)), "alike": alike}
    for lambd in (0.0, 0.5, 1.0, "1/t", "1-1/t"):
        row[f"effect_{lambd}"] = list(as_shown(found[lambd], kind)) if lambd in found else None
    return row
