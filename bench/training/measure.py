"""Training steps of all implementations in turns, as many rounds as a time allows, and what follows from them: rows of a result."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from bench.masters.clock import best_clock
from bench.page import count
from bench.providers import REFERENCE
from bench.timing import block_of, interleave, quantiles, rounds_within
from bench.training.models import Kind
from bench.training.runs import BASE, LOOP, Run, missing

__all__ = ["LEAST_ROUNDS", "MOST_ROUNDS", "Samples", "measure", "rows_of"]

LEAST_ROUNDS, MOST_ROUNDS = 6, 100  # of all sets together
Say = Callable[[str], None]


@dataclass
class Samples:
    """Milliseconds of a step and of its optimizer, by round: the k-th samples of all implementations are of one round."""

    step: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)


def measure(
    name: str, kind: Kind, names: Sequence[str], *, seconds: float, rounds: int | None, say: Say, quick: bool = False
) -> list[dict[str, Any]]:
    """Return a row for each implementation that runs here. The base always takes part.

    Args:
        seconds: the time of all rounds together; they may take longer where LEAST_ROUNDS do.
        rounds: as many, whatever they take.
    """
    start = monotonic()
    found: dict[str, Samples] = {}
    sets = 1 if quick else kind.sets if rounds is None else min(kind.sets, rounds)
    facts: dict[str, Any] = {}
    block: int | None = None
    for number in range(sets):
        runs = _runs(kind, names, quick, say if number == 0 else _nothing)
        block = block or block_of(_timed(runs[BASE]))  # of the base's; all others take as many steps
        for run in runs.values():
            run.block = block
        turns = _rounds_of_a_set(runs, (seconds - (monotonic() - start)) / (sets - number), sets, rounds)
        taken = interleave(runs, rounds=turns, warmup=0, clock=best_clock())
        for each, run in runs.items():
            samples = found.setdefault(each, Samples())
            samples.step += [ms / block for ms in taken[each]]
            samples.optimizer += run.optimizer_ms[-turns:]
        base = runs[BASE]
        facts = {"batch": base.batch, "n_tensors": len(base.params), "numel": sum(param.numel() for param in base.params)}
        del runs, run, base
        gc.collect()  # five copies of GPT-2 must not lie beside the next model's
    say(f"{name}: {count(len(found[BASE].step), 'round')} of {count(block, 'step')} each, {monotonic() - start:.0f} s")
    common = {"model": name, "base": kind.base, "micro_batches": kind.micro_batches, **facts, "block": block, "sets": sets}
    return [{"kind": "training", **common, **row} for row in rows_of(found)]


def _nothing(line: str) -> None:
    pass


def _runs(kind: Kind, names: Sequence[str], quick: bool, say: Say) -> dict[str, Run]:
    """Those that run here, after one step each: what fails at its first step must not take the others' results along."""
    base = Run(BASE, kind, quick=quick)
    base()
    runs = {BASE: base}
    for name in names:
        if name == BASE:
            continue
        if (reason := missing(name, kind, len(base.params))) is not None:
            say(f"skipped {name}: {reason}")
            continue
        try:
            run = Run(name, kind, quick=quick)
            run()
        except Exception as error:
            if name == REFERENCE:
                raise
            say(f"skipped {name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            continue
        runs[name] = run
    return runs


def _timed(run: Run) -> float:
    """Milliseconds of one step."""
    clock = best_clock()
    start = clock()
    run()
    return (clock() - start) / 1e6


def _rounds_of_a_set(runs: Mapping[str, Run], seconds: float, sets: int, rounds: int | None) -> int:
    """A round of warm steps is timed, unless the number is given."""
    start = monotonic()
    for run in runs.values():
        run()
    if rounds is not None:
        return math.ceil(rounds / sets)
    return rounds_within(seconds, monotonic() - start, least=math.ceil(LEAST_ROUNDS / sets), most=MOST_ROUNDS // sets)


def rows_of(found: Mapping[str, Samples]) -> list[dict[str, Any]]:
    """Quantiles (20, 50, 80 %) of a step, of its optimizer, of the optimizer's share, and of ratios of steps in the same round.

    ``over_base_*``: a step over the base's. ``over_loop_*``: a step of SAM over the usual loop's, where that was measured.
    """
    rows = []
    for name, samples in found.items():
        row: dict[str, Any] = {"provider": name, "rounds": len(samples.step)}
        row |= _quantiles("ms", samples.step) | _quantiles("optimizer_ms", samples.optimizer)
        row |= _quantiles("share", _ratios(samples.optimizer, samples.step))
        row |= _quantiles("over_base", _ratios(samples.step, found[BASE].step))
        if LOOP in found and name != BASE:
            row |= _quantiles("over_loop", _ratios(samples.step, found[LOOP].step))
        rows.append(row)
    return rows


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def _quantiles(name: str, values: list[float]) -> dict[str, float]:
    q = quantiles(values)
    return {f"{name}_20": round(q.ms_20, 5), f"{name}_50": round(q.ms_50, 5), f"{name}_80": round(q.ms_80, 5)}
