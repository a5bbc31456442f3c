"""What an experiment is, and what all of them share: times to look at, the comparison with the optimizer, cells of tables.

An experiment is made of pieces, functions of JSON to JSON that :meth:`Context.map` makes: each compares its own steps with the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench import batched
from bench.linear_models import Draw, Floats, LinearModels
from bench.papers.context import Context
from sam_kernels.cli.output import rounded

__all__ = [
    "COMPARED",
    "TOLERANCE",
    "Column",
    "Experiment",
    "Measured",
    "compare",
    "curve",
    "cut",
    "difference",
    "look",
    "signed",
    "together",
    "tune_axes",
]

# Of one step, relative: the two ways add up the same products in another order, n and d <= 100 of them twice, with 2^-53 each, and
# terms are no more than some ten times as large as their sum.
TOLERANCE = 1e-12
COMPARED = {False: 300, True: 30}  # steps that are compared, by whether the run is a quick one


@dataclass
class Measured:
    settings: dict[str, Any]
    rows: list[dict[str, Any]]  # of the table
    points: list[dict[str, Any]] = field(default_factory=list)  # of the figure: goes into the CSV


@dataclass(frozen=True)
class Column:
    key: str
    heading: str
    shown: Callable[[Any], str] = str


@dataclass(frozen=True)
class Experiment:
    title: str
    columns: Sequence[Column]
    measure: Callable[[Context], Measured]
    draw: Callable[[Measured], Figure]

    def cells(self, row: dict[str, Any]) -> list[str]:
        return ["–" if row[column.key] is None else column.shown(row[column.key]) for column in self.columns]


def look(
    models: LinearModels,
    start: Floats,
    draws: Iterable[Draw],
    steps: batched.Steps,
    times: Sequence[int],
    see: Callable[[Floats], Floats],
) -> Floats:
    """``see`` of the points at ``times``, ascending, 0 is ``start``: (times, …)."""
    wanted = set(times)
    found = [see(start)] if 0 in wanted else []
    with np.errstate(over="ignore", invalid="ignore"):  # a step that is too long diverges: its runs show it
        for t, x in enumerate(batched.trajectories(models, start, draws, steps), 1):
            if t in wanted:
                found.append(see(x))
    return np.stack(found)


def compare(models: LinearModels, start: Floats, draws: Sequence[Draw], steps: batched.Steps, runs: int) -> dict[str, Any]:
    """Settings that say how far ``runs`` runs, spread over all of them, are from the library's optimizer. Raises RuntimeError where it is
    more than rounding."""
    pairs = [(k % start.shape[0], k) for k in np.unique(np.linspace(0, start.shape[1] - 1, runs).round().astype(int)).tolist()]
    worst = batched.deviation(models, start, draws, steps, pairs)
    if not worst <= TOLERANCE:
        raise RuntimeError(f"the batched steps are {worst:.2g} away from those of sam_kernels.UnifiedSAM")
    return {"compared_runs": len(pairs), "compared_steps": len(draws), "largest_deviation": cut(worst, 2)}


def together(pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What :func:`compare` found in several pieces, as of one: all runs, the fewest steps, the largest deviation."""
    return {
        "compared_runs": sum(piece["compared_runs"] for piece in pieces),
        "compared_steps": min(piece["compared_steps"] for piece in pieces),
        "largest_deviation": max(piece["largest_deviation"] for piece in pieces),
    }


def signed(value: float) -> str:
    """Two decimals with a sign; what rounds to 0 is +0.00, from either side."""
    return f"{rounded(value, 2):+.2f}"


def difference(value: Sequence[float]) -> str:
    """A mean with its sign, and its error: both are in ``value``."""
    return f"{signed(value[0])} ± {value[1]:.2f}"


def cut(value: float, digits: int = 5) -> float:
    """As many digits as a result file needs."""
    return float(f"{value:.{digits}g}")


def curve(series: dict[str, Any], times: Sequence[int], **values: Floats) -> list[dict[str, Any]]:
    """Lines of the CSV: one a time."""
    return [series | {"step": t} | {name: cut(float(found[k])) for name, found in values.items()} for k, t in enumerate(times)]


def tune_axes(figure: Figure) -> Figure:
    for axis in figure.axes:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure
