"""Steps of all loops in turns, and what follows from them: SAM's cost in a framework, and the part of it that the integration adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from statistics import median
from time import perf_counter_ns, process_time_ns
from typing import Any

import torch

from bench.frameworks.loops import PLAIN, PLAIN_BACKWARD, PLAIN_SAM, make_loop, names_of
from bench.frameworks.own_time import WARMUP, own_time
from bench.frameworks.paced import Paced
from bench.frameworks.problem import Problem
from bench.timing import interleave, quantiles

__all__ = ["STUB", "added", "measure"]

STUB = Problem(layers=0)
OF_STUB = 5  # steps of the model without passes for each of the other's
OWN_STEPS = 200
Samples = dict[str, list[float]]


def _clock() -> Callable[[], int]:
    """With one thread of torch's the time of the process on a processor: one loop runs at a time, each in a thread of its own."""
    return process_time_ns if torch.get_num_threads() == 1 else perf_counter_ns


def _samples(problem: Problem, names: Sequence[str], *, rounds: int, inner: int) -> Samples:
    """Milliseconds of the steps of each loop. A turn is one step to warm the caches, and ``inner`` timed ones."""
    loops = {name: Paced(make_loop(name, problem, WARMUP + rounds * (1 + inner))) for name in names}
    samples = interleave(loops, rounds=rounds, warmup=WARMUP, settle=1, inner=inner, clock=_clock())
    for loop in loops.values():
        loop.finish()
    return samples


def added(samples: Samples, framework: str) -> list[float]:
    """Return what the integration adds to each step, in milliseconds: SAM's cost in the framework, less its cost in a plain loop.

    The framework's own work for a second pass is a part of it.
    """
    columns = [samples[name] for name in (*names_of(framework), PLAIN, PLAIN_SAM)]
    return [(sam - adamw) - (plain_sam - plain) for adamw, sam, plain, plain_sam in zip(*columns, strict=True)]


def measure(frameworks: Sequence[str], *, problem: Problem, rounds: int, inner: int, own_steps: int = OWN_STEPS) -> dict[str, Any]:
    """Return the problem, milliseconds of every loop's steps (20, 50 and 80 %), and a row for each framework."""
    names = [PLAIN, PLAIN_SAM, PLAIN_BACKWARD, *(name for framework in frameworks for name in names_of(framework))]
    steps = _samples(problem, names, rounds=rounds, inner=inner)
    stubs = _samples(STUB, names, rounds=rounds, inner=OF_STUB * inner)
    rows = []
    for framework in frameworks:
        adamw, sam = names_of(framework)
        own_us = median(own_time(make_loop(sam, STUB, WARMUP + own_steps)))
        step_us, host_us = 1e3 * median(steps[sam]), 1e3 * median(added(stubs, framework))
        of_step = [100 * each / whole for each, whole in zip(added(steps, framework), steps[sam], strict=True)]
        rows.append(
            {
                "framework": framework,
                "version": version(framework),
                "of_adamw": _quantiles(_ratios(steps[sam], steps[adamw])),
                "added_pct": _quantiles(of_step),
                "host_us": round(host_us, 1),
                "host_pct": round(100 * host_us / step_us, 3),
                "own_us": round(own_us, 1),
                "own_pct": round(100 * own_us / step_us, 3),
            }
        )
    return {
        "problem": problem.settings(),
        "ms": {name: _quantiles(each) for name, each in steps.items()},
        "stub_ms": {name: _quantiles(each) for name, each in stubs.items()},
        "plain_of_adamw": {name: _quantiles(_ratios(steps[name], steps[PLAIN])) for name in (PLAIN_SAM, PLAIN_BACKWARD)},
        "rows": rows,
    }


def _ratios(ours: Sequence[float], others: Sequence[float]) -> list[float]:
    return [each / other for each, other in zip(ours, others, strict=True)]


def _quantiles(values: list[float]) -> list[float]:
    found = quantiles(values)
    return [round(each, 4) for each in (found.ms_20, found.ms_50, found.ms_80)]
