"""The cost stage: a whole training step of each method over one of the base, with blocks of steps that take turns in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter_ns, thread_time_ns
from typing import Any

import numpy as np
import torch

from bench.dial.methods import BASE, LATE
from bench.dial.tasks import Task
from bench.dial.training import Training
from bench.timing import interleave, quantiles

__all__ = ["BAR", "BLOCK", "bar", "measure"]

BLOCK = 40  # steps: whole periods of 2 and 5, and five steps of SAM in forty for the last 12.5 %
BAR = 1.13  # of the last 12.5 %, times the base: 1 / 8 more passes, and less than half a percent beside them


def measure(task_name: str, task: Task, methods: Sequence[str], *, rounds: int, block: int = BLOCK) -> list[dict[str, Any]]:
    """Return a row for each method: milliseconds of a step, and a block's time over that of the base's block in the same round."""
    calls = {name: _block(task, name, block) for name in methods}
    clock = thread_time_ns if torch.get_num_threads() == 1 else perf_counter_ns
    samples = interleave(calls, rounds=rounds, warmup=1, clock=clock)
    rows = []
    for name in methods:
        found = quantiles(samples[name])
        ratios = [ours / base for ours, base in zip(samples[name], samples[BASE], strict=True)]
        low, high = np.quantile(ratios, (0.2, 0.8)).tolist()
        rows.append(
            {
                "task": task_name,
                "method": name,
                "ms": [round(ms / block, 4) for ms in (found.ms_20, found.ms_50, found.ms_80)],
                "of_base": [round(ratio, 4) for ratio in (low, median(ratios), high)],
                "rounds": rounds,
                "block": block,
            }
        )
    return rows


def _block(task: Task, name: str, steps: int) -> Callable[[], None]:
    training = Training(task, name, None if name == BASE else task.rho, seed=0, steps=steps, held_out=False, repeats=True)

    def block() -> None:
        for _ in range(steps):
            training.step()

    return block


def bar(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each task: the cost of the last 12.5 % to reach, the cost measured, pass or FAIL."""
    found = [(row["task"], row["of_base"][1]) for row in rows if row["method"] == LATE]
    return [
        f"{task}: SAM in the last 12.5 %: at most {BAR} × base: {cost:.3f}: {'pass' if cost <= BAR else 'FAIL'}" for task, cost in found
    ]
