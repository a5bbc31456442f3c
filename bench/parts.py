"""The parts of ``python -m bench``: rows of training steps, optimizer steps, operations and memory, each within a time of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from bench import memory, ops, steps
from bench.byte_model import OPS
from bench.training import __main__ as training
from bench.training.models import MODELS
from bench.training.runs import NAMES
from bench.workloads import WORKLOADS, Workload

__all__ = ["FILES", "MINUTES", "PARTS", "TESTS", "Choice", "file_of", "is_whole", "measure", "seconds_of"]

# What is measured must be right, and all implementations must do the same work.
TESTS = (*training.TESTS, "tests/bench/test_bench_peers.py", "tests/bench/test_bench_micro_batches.py")
MINUTES = {"training": 10.0, "steps": 4.5, "operations": 5.0}  # on two cores; memory takes as long as its processes, about a minute
PARTS = (*MINUTES, "memory")
FILES = {"training": ("training",), "optimizer": ("steps", "operations", "memory")}  # stored results, and the parts in each
QUICK_ROUNDS = 3
SMALLEST = 1e6  # elements; below, the interpreter's own allocations drown the optimizer's
LARGEST = 50e6  # elements; above, a round of m-SAM takes ten seconds, and repeats what smaller models show
Say = Callable[[str], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """What is measured. ``memory``: bytes that optimizers measured together may hold. ``rounds`` None: as many as the time allows."""

    workloads: Sequence[str]
    dtypes: Sequence[str]
    bases: Sequence[str]
    providers: Sequence[str]
    operations: Sequence[str]
    micro_batches: int
    rounds: int | None
    memory: int
    quick: bool

    @property
    def combinations(self) -> list[tuple[Workload, str, str]]:
        """Workload, base and dtype. Of 1,000 small tensors the host's work decides, which does not depend on the dtype."""
        chosen = [(base, dtype) for base, dtype in steps.COMBINATIONS if base in self.bases and dtype in self.dtypes]
        found = itertools.product((WORKLOADS[name] for name in self.workloads), chosen)
        return [(workload, base, dtype) for workload, (base, dtype) in found if dtype == "fp32" or workload.numel > SMALLEST]


def seconds_of(chosen: Sequence[str], budget: float | None) -> dict[str, float]:
    """Return the seconds of each chosen part, 0 of one that is not timed: its own, or its share of ``budget`` minutes."""
    minutes = {part: MINUTES.get(part, 0.0) for part in chosen}
    total = sum(minutes.values())
    factor = 60.0 if budget is None or not total else 60.0 * budget / total
    return {part: factor * each for part, each in minutes.items()}


def file_of(part: str) -> str:
    """Return the name of the stored result that has the rows of a part."""
    return next(name for name, members in FILES.items() if part in members)


def is_whole(name: str, chosen: Sequence[str]) -> bool:
    """Return whether all parts of a stored result are chosen, or none of them."""
    return len({part in chosen for part in FILES[name]}) == 1


def measure(part: str, choice: Choice, seconds: float, say: Say) -> Iterator[Row]:
    """Yield the rows of a part."""
    if part == "training":
        rounds = training.QUICK_ROUNDS if choice.quick and choice.rounds is None else choice.rounds
        yield from training.rows(
            list(MODELS),
            NAMES,
            seconds=seconds,
            rounds=rounds,
            with_regimes=True,
            with_memory=not choice.quick,
            quick=choice.quick,
            say=say,
        )
    elif part == "memory":
        for workload, base, dtype in () if choice.quick else choice.combinations:
            if SMALLEST < workload.numel <= LARGEST:  # in copies of the parameters, it is the same for larger ones
                yield from memory.measure(workload, base, dtype, choice.providers, say)
    else:
        yield from (_steps if part == "steps" else _operations)(choice, seconds, say)


def _steps(choice: Choice, seconds: float, say: Say) -> Iterator[Row]:
    for base, dtype in itertools.product(choice.bases, choice.dtypes):
        if (base, dtype) not in steps.COMBINATIONS:
            say(f"skipped steps of {base} in {dtype}: 16-bit parameters are measured with AdamW")
    cases = [(*combination, 1) for combination in choice.combinations]
    cases += [
        (workload, base, dtype, choice.micro_batches)
        for workload, base, dtype in choice.combinations
        if choice.micro_batches > 1 and (base, dtype) in steps.MICRO_BATCH_COMBINATIONS and workload.numel <= LARGEST
    ]
    common = {"rounds": _rounds(choice), "memory": choice.memory, "say": say}
    end = monotonic() + seconds
    for number, (workload, base, dtype, micro_batches) in enumerate(cases):
        share = steps.share(end, [case[0] for case in cases[number:]])
        yield from steps.measure(workload, base, dtype, choice.providers, seconds=share, micro_batches=micro_batches, **common)


def _operations(choice: Choice, seconds: float, say: Say) -> Iterator[Row]:
    """Those beside OPS in float32 alone: what a narrower type changes, OPS show."""
    backends = ops.available_backends(say)
    cases = [
        (WORKLOADS[workload], dtype, name)
        for workload, dtype, name in itertools.product(choice.workloads, choice.dtypes, choice.operations)
        if dtype == "fp32" or (WORKLOADS[workload].numel > SMALLEST and name in OPS)
    ]
    common = {"rounds": _rounds(choice), "memory": choice.memory, "say": say}
    end = monotonic() + seconds
    for number, (workload, dtype, name) in enumerate(cases):
        yield from ops.measure(workload, name, dtype, backends, seconds=steps.share(end, [case[0] for case in cases[number:]]), **common)


def _rounds(choice: Choice) -> int | None:
    return QUICK_ROUNDS if choice.quick and choice.rounds is None else choice.rounds
