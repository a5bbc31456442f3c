"""Each operation alone, on each backend, against torch and against the fastest plain pass with its mix of reads and writes."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from bench import floor
from bench.byte_model import CALLS, Traffic, call_bytes
from bench.environment import last_level_cache_bytes
from bench.op_calls import describe_once, make_lists, ours, torch_call
from bench.page import count
from bench.timing import quantiles, quantiles_of_ratios
from bench.turns import Turns, timed_turns
from bench.workloads import DTYPES, Workload
from sam_kernels._dispatch import BACKENDS, reason_missing

__all__ = ["REFERENCE", "available_backends", "buffer_sets", "measure"]

T = TypeVar("T")
Call = Callable[[], object]
MAX_SETS = 64
FEW_SETS = 8  # where the caches cannot be outgrown; several, because where small tensors lie in memory moves their times
CACHES = 3  # the buffers of one round are this many times the last level cache
LARGE = 50e6  # elements; above, the fallback takes seconds a call and checking plain lists no part of the time
RANDOM = "random_perturb_"
SMALL = 1e6  # elements; above, the fallback takes seconds for random numbers, which it computes by tensor operations
FLOOR_BYTES = 64 << 20  # of a list, where the finalists among plain passes are chosen
REFERENCE, FALLBACK, TORCH = "native", "foreach", "torch"
FLOOR = "floor: "


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
    """Calls ``run`` on the next set. Every call has a counter of its own, so none finds the set that another left in the caches."""
    counter = itertools.count()
    return lambda: run(sets[next(counter) % len(sets)])


@functools.cache
def _finalists(traffic: Traffic) -> tuple[str, ...]:
    """Names of the fastest plain passes with this mix, on buffers that outgrow the caches."""
    sets, _ = buffer_sets(FLOOR_BYTES * len(traffic.lists), last_level_cache_bytes(), MAX_SETS * FLOOR_BYTES)
    flat = [floor.flat_buffers(traffic, FLOOR_BYTES) for _ in range(sets)]
    return tuple(floor.finalists(floor.candidates(traffic), flat))


def _floor_calls(traffic: Traffic, list_bytes: int, sets: int) -> dict[str, Call]:
    """The finalists, their names prefixed by FLOOR."""
    flat = [floor.flat_buffers(traffic, list_bytes) for _ in range(sets)]
    passes = floor.candidates(traffic)
    return {f"{FLOOR}{name}": _in_turn(passes[name], flat) for name in _finalists(traffic.without_names())}


def measure(
    workload: Workload,
    name: str,
    dtype_name: str,
    backends: Sequence[str],
    *,
    seconds: float,
    rounds: int | None,
    memory: int,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Yield rows of the result file. Where the buffers stay in the caches there is no floor: the time is the host's work per tensor.

    ``over_native_*``: quantiles of the ratios to the native backend in the same round. ``of_floor_*``: the same of the floor's time to the
    row's, so 1 is as fast as the floor.

    Args:
        name: of :data:`bench.byte_model.CALLS`.
        seconds, rounds: as :func:`bench.turns.timed_turns` has them.
        memory: bytes that all buffers may take.
    """
    traffic, dtype = CALLS[name], DTYPES[dtype_name]
    list_bytes = workload.numel * dtype.itemsize
    nbytes = call_bytes(name, workload.numel, dtype.itemsize)
    sets, regime = buffer_sets(list_bytes * len(traffic.lists), last_level_cache_bytes(), memory // 3)
    lists = [make_lists(name, workload.shapes, dtype) for _ in range(sets)]
    described = [describe_once(given) for given in lists]
    taking_part = [backend for backend in backends if backend != FALLBACK or workload.numel <= (SMALL if name == RANDOM else LARGE)]
    calls = {backend: _in_turn(ours(name, backend), described) for backend in taking_part}
    if workload.numel <= LARGE:  # a caller of sam_kernels.functional whose lists are plain: every tensor is checked on every call
        calls |= {f"{each}, plain lists": _in_turn(ours(name, each), lists) for each in taking_part if each != FALLBACK}
    calls[TORCH] = _in_turn(torch_call(name), lists)
    if regime == "memory":
        calls |= _floor_calls(traffic, list_bytes, sets)
    samples = timed_turns(lambda: Turns(calls), sets=1, seconds=seconds, rounds=rounds, warmup=sets if regime == "memory" else FEW_SETS)
    say(f"{workload.name} {dtype_name} {name}: {count(len(samples[TORCH]), 'round')}, {count(sets, 'set')} of buffers ({regime})")
    floors = {each: samples.pop(each) for each in list(samples) if each.startswith(FLOOR)}
    best = min(floors, key=lambda each: quantiles(floors[each]).ms_50, default=None)
    for backend, values in samples.items():
        q = quantiles(values)
        yield {
            "kind": "op",
            "op": name,
            "workload": workload.name,
            "dtype": dtype_name,
            "base": None,
            "backend": backend,
            "n_tensors": workload.n_tensors,
            "numel": workload.numel,
            "bytes": nbytes,
            "ms_20": q.ms_20,
            "ms_50": q.ms_50,
            "ms_80": q.ms_80,
            "gbps": nbytes / q.ms_50 / 1e6,
            **_ratios("over_native", values, samples.get(REFERENCE)),
            **_ratios("of_floor", None if best is None else floors[best], values),
            "floor": best and best.removeprefix(FLOOR),
            "floor_gbps": None if best is None else nbytes / quantiles(floors[best]).ms_50 / 1e6,
            "samples": len(values),
            "regime": regime,
            "sets": sets,
        }


def _ratios(name: str, numerators: list[float] | None, denominators: list[float] | None) -> dict[str, float | None]:
    if numerators is None or denominators is None:
        return {f"{name}_{share}": None for share in (20, 50, 80)}
    q = quantiles_of_ratios(numerators, denominators)
    return {f"{name}_20": q.ms_20, f"{name}_50": q.ms_50, f"{name}_80": q.ms_80}
