"""What the benchmark measures, as a list of stages in their order. A stage is a name and a function from a run to rows of the result file.

The most telling stages come first: a run that is cut off has those. A new stage is a line in ``STAGES``.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.gpu import bars, ops, products, steps, sweep, sweep_products, training
from bench.gpu.gate import Gate
from bench.gpu.timing import Clock
from bench.gpu.workloads import GPU_WORKLOADS
from bench.workloads import Workload

__all__ = ["STAGES", "SWEEPS", "Run", "Stage", "measure", "steps_with_bars"]

Rows = Iterator[dict[str, Any]]
ROOM = 0.92  # of the device's free memory


@dataclass(frozen=True)
class Run:
    """``deadline``: by time.monotonic(); what would begin later is left out, and named. ``say`` takes such lines."""

    clock: Clock
    device: str
    gate: Gate
    deadline: float
    workloads: dict[str, Workload]
    dtypes: Sequence[str]
    op_names: Sequence[str]
    copy_gbps: float
    say: Callable[[str], None]

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    @property
    def common(self) -> dict[str, Any]:
        """Arguments of what measures operations and steps."""
        seconds = 0.02 if self.device == "cpu" else 0.25
        return {"clock": self.clock, "device": self.device, "copy_gbps": self.copy_gbps, "seconds": seconds, "say": self.say}


@dataclass(frozen=True)
class Stage:
    """``seconds_after``: that the stages after it are left, if they are asked for."""

    name: str
    rows: Callable[[Run], Rows]
    seconds_after: float = 0.0


def steps_with_bars() -> list[tuple[str, str, str]]:
    """(workload, base, dtype) of every figure on steps, the smallest workload first."""
    beside_copy = [(workload, *combination) for workload in bars.OF_COPY for combination in steps.COMBINATIONS]
    asked = dict.fromkeys(case[:3] for case in (*beside_copy, *bars.SPEEDUPS, *bars.LAUNCHES, *bars.ORDERS, *bars.OF_TORCH))
    return sorted(asked, key=lambda case: GPU_WORKLOADS[case[0]].numel)


def _fits(run: Run, nbytes: int, what: str) -> bool:
    if run.device == "cpu":
        return True
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] * ROOM
    if nbytes > free:
        run.say(f"left out: {what}: needs {nbytes / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} GiB can be had")
    return nbytes <= free


def _guarded(run: Run, rows: Rows, what: str) -> Rows:
    """What goes wrong with one case must not take the others along."""
    try:
        yield from rows
    except Exception as error:
        run.say(f"left out: {what}: {type(error).__name__}: {str(error)[:300]}")


def _ops(run: Run, name: str) -> Rows:
    """Every operation on one workload."""
    workload = run.workloads.get(name)
    if workload is None:
        return
    backends = ops.backends_on(run.device, run.say)
    for refused in run.gate.refused(run.op_names, backends):
        run.say(f"left out: {refused}: no green test")
    for dtype, op in itertools.product(run.dtypes, run.op_names):
        what = f"{op} {name} {dtype}"
        if run.is_over:
            run.say(f"left out: {what}: out of time")
        elif _fits(run, ops.memory_needed(op, workload, dtype), what):
            mine = [backend for backend in backends if run.gate.allows(op, backend)]
            yield from _guarded(run, ops.measure(workload, op, dtype, mine, **run.common), what)


def _steps(run: Run, cases: Iterable[tuple[str, str, str]]) -> Rows:
    """Whole steps of (workload, base, dtype)."""
    for name, base, dtype in cases:
        if name not in run.workloads or dtype not in run.dtypes:
            continue
        workload, what, mine = run.workloads[name], f"steps of {base} {name} {dtype}", steps.allowed(run.gate, base, run.device)
        if not mine or run.is_over:
            run.say(f"left out: {what}: {'out of time' if mine else 'no green test of one of its operations'}")
            continue
        together = _fits(run, steps.memory_needed(workload, base, dtype, mine), f"{what}, all at a time")
        for few in [mine] if together else [[backend] for backend in mine]:
            alone = f"{what} on {' and '.join(few)}"
            if together or _fits(run, steps.memory_needed(workload, base, dtype, few), alone):
                yield from _guarded(run, steps.measure(workload, base, dtype, few, **run.common), alone)


def _other_steps(run: Run, name: str) -> Rows:
    """Those of a workload that have no bar."""
    with_bars = steps_with_bars()
    return _steps(run, [case for base, dtype in steps.COMBINATIONS if (case := (name, base, dtype)) not in with_bars])


def _training(run: Run) -> Rows:
    return training.measure(run.clock, run.device, run.gate, run.deadline, copy_gbps=run.copy_gbps, say=run.say)


def _workload(name: str) -> Stage:
    return Stage(name, lambda run: itertools.chain(_other_steps(run, name), _ops(run, name)))


STAGES = (
    Stage("bars", lambda run: _steps(run, steps_with_bars())),
    Stage("one_1e8", lambda run: itertools.chain(_ops(run, "one_1e8"), _other_steps(run, "one_1e8"))),
    _workload("resnet18"),
    _workload("resnet50"),
    Stage("training", _training),
    _workload("one_1e9"),
    Stage("products", lambda run: products.measure(run.clock, run.device, run.gate, run.deadline, dtypes=run.dtypes, say=run.say)),
    _workload("gpt2_124m"),
    _workload("many_tiny"),
    Stage("sweep", lambda run: sweep.run(run.clock, run.device, run.gate, run.deadline, dtypes=run.dtypes), seconds_after=25.0),
    Stage("sweep_products", lambda run: sweep_products.run(run.clock, run.device, run.gate, run.deadline)),
)
SWEEPS = ("sweep", "sweep_products")


def measure(run: Run, names: Sequence[str]) -> Rows:
    """The rows of these stages, in the order of ``STAGES``."""
    chosen = [stage for stage in STAGES if stage.name in names]
    for stage in chosen:
        is_last = stage is chosen[-1]
        mine = run if is_last else replace(run, deadline=run.deadline - stage.seconds_after)
        if mine.is_over:
            run.say(f"left out: stage {stage.name}: out of time")
            continue
        start = time.monotonic()
        yield from _guarded(mine, stage.rows(mine), f"the rest of stage {stage.name}")
        run.say(f"stage {stage.name}: {time.monotonic() - start:.1f} s")
