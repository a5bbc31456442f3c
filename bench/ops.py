"""Each operation alone, on each backend, against torch and against the fastest plain pass with its mix of reads and writes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from bench import floor
from bench.byte_model import OPS, Traffic, op_bytes
from bench.environment import last_level_cache_bytes
from bench.op_calls import describe_once, make_lists, ours, torch_call
from bench.steps import takes
from bench.timing import Quantiles, interleave, quantiles
from bench.workloads import DTYPES, Workload
from sam_kernels._dispatch import BACKENDS, reason_missing

__all__ = ["available_backends", "buffer_sets", "measure"]

T = TypeVar("T")
Call = Callable[[], object]
MAX_SETS = 64
FEW_SETS = 4  # where the caches cannot be outgrown
CACHES = 3  # the buffers of one round are this many times the last level cache
COPY = OPS["restore_"]
TORCH = "torch"
FLOOR, COPY_FLOOR = "floor: ", "copy: "


def available_backends(say: Callable[[str], None]) -> list[str]:
    names = []
    for name in BACKENDS:
        reason = reason_missing(name)
        if reason is None:
            names.append(name)
        else:
            say(f"skipped backend {name}: {reason}")
    return names


def buffer_sets(bytes_per_set: int, cache: int, budget: int) -> tuple[int, str]:
    """How many sets of buffers to go through in turn, and whether they outgrow the caches."""
    wanted = max(1, math.ceil(CACHES * cache / bytes_per_set))
    return (wanted, "memory") if wanted <= min(MAX_SETS, max(1, budget // bytes_per_set)) else (FEW_SETS, "cached")


def _in_turn(run: Callable[[T], object], sets: Sequence[T]) -> Call:
    """Calls ``run`` on the next set. Everyone has a counter of his own, so nobody finds the set the one before him left in the caches."""
    counter = itertools.count()
    return lambda: run(sets[next(counter) % len(sets)])


def _floor_calls(traffic: Traffic, list_bytes: int, sets: int, label: str) -> dict[str, Call]:
    """The finalists among the plain passes with this mix, their names prefixed by ``label``."""
    flat = [floor.flat_buffers(traffic, list_bytes) for _ in range(sets)]
    return {f"{label}{name}": _in_turn(run, flat) for name, run in floor.finalists(floor.candidates(traffic), flat).items()}


def _best_gbps(samples: dict[str, Quantiles], label: str, nbytes: int) -> tuple[str | None, float | None]:
    """Takes the finalists out of ``samples``. Returns the winner's name and GB/s."""
    found = {name: samples.pop(name) for name in list(samples) if name.startswith(label)}
    if not found:
        return None, None
    winner = min(found, key=lambda name: found[name].ms_50)
    return winner.removeprefix(label), nbytes / found[winner].ms_50 / 1e6


def measure(
    workload: Workload, op: str, dtype_name: str, backends: Sequence[str], *, rounds: int | None, budget: int, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Rows of the result file. Where the buffers stay in the caches there is no floor: the time is the host's work per tensor."""
    traffic, dtype = OPS[op], DTYPES[dtype_name]
    list_bytes = workload.numel * dtype.itemsize
    nbytes = op_bytes(op, workload.numel, dtype.itemsize)
    sets, regime = buffer_sets(list_bytes * len(traffic.lists), last_level_cache_bytes(), budget // 3)
    lists = [make_lists(op, workload.shapes, dtype) for _ in range(sets)]
    described = [describe_once(given) for given in lists]
    calls = {name: _in_turn(ours(op, name), described) for name in backends}
    # What a caller of sam_kernels.functional pays who does not own his lists: every tensor is checked on every call.
    calls |= {f"{name}, plain lists": _in_turn(ours(op, name), lists) for name in backends if name != "foreach"}
    calls[TORCH] = _in_turn(torch_call(op), lists)
    if regime == "memory":
        calls |= _floor_calls(traffic, list_bytes, sets, FLOOR)
        if traffic.writes and traffic != COPY:
            calls |= _floor_calls(COPY, list_bytes, max(1, sets * traffic.passes // COPY.passes), COPY_FLOOR)
    say(f"{workload.name} {dtype_name} {op}: {sets} set(s) of buffers ({regime})")
    timed = interleave(calls, rounds=takes(workload.numel, rounds), warmup=sets + 1 if regime == "memory" else FEW_SETS)
    samples = {name: quantiles(values) for name, values in timed.items()}
    floor_name, floor_gbps = _best_gbps(samples, FLOOR, nbytes)
    _, copy_gbps = _best_gbps(samples, COPY_FLOOR, op_bytes("restore_", workload.numel, dtype.itemsize))
    if traffic == COPY:
        copy_gbps = floor_gbps
    for name, q in samples.items():
        yield {
            "kind": "op",
            "op": op,
            "workload": workload.name,
            "dtype": dtype_name,
            "base": None,
            "backend": name,
            "n_tensors": workload.n_tensors,
            "numel": workload.numel,
            "bytes": nbytes,
            **_speed(q, nbytes, floor_gbps, copy_gbps),
            "floor": floor_name,
            "floor_gbps": floor_gbps,
            "copy_gbps": copy_gbps,
            "regime": regime,
            "sets": sets,
        }


def _speed(q: Quantiles, nbytes: int, floor_gbps: float | None, copy_gbps: float | None) -> dict[str, float | None]:
    gbps = nbytes / q.ms_50 / 1e6
    return {
        "ms_20": q.ms_20,
        "ms_50": q.ms_50,
        "ms_80": q.ms_80,
        "gbps": gbps,
        "pct_floor": None if floor_gbps is None else 100 * gbps / floor_gbps,
        "pct_copy": None if copy_gbps is None else 100 * gbps / copy_gbps,
    }
