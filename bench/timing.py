"""Times several callables in one process, taking turns, so that a disturbance of the machine meets all of them."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns
from types import MappingProxyType

import numpy as np

__all__ = ["BLOCK_MS", "Quantiles", "block_of", "interleave", "quantiles", "quantiles_of_ratios", "rounds_within"]

Call = Callable[[], object]
BLOCK_MS = 25.0  # a turn takes as long, so that what other calls leave in the caches is a small part of it
MOST_CALLS = 64  # of a turn


@dataclass(frozen=True)
class Quantiles:
    """Milliseconds below which 20, 50 and 80 % of the samples lie."""

    ms_20: float
    ms_50: float
    ms_80: float


def quantiles(samples_ms: list[float]) -> Quantiles:
    return Quantiles(*(float(q) for q in np.quantile(samples_ms, (0.2, 0.5, 0.8))))


def quantiles_of_ratios(numerators: list[float], denominators: list[float]) -> Quantiles:
    """Quantiles of the ratios of samples of the same round."""
    return quantiles([a / b for a, b in zip(numerators, denominators, strict=True)])


def block_of(ms: float, most: int = MOST_CALLS) -> int:
    """Return the calls of a turn of BLOCK_MS or a little more, for a call that takes ``ms``; at most ``most``."""
    return max(1, min(most, math.ceil(BLOCK_MS / max(ms, 1e-3))))


def rounds_within(seconds: float, round_seconds: float, *, least: int, most: int) -> int:
    """Return how many rounds fit into the time that is left after one round was timed, from ``least`` to ``most``."""
    round_seconds = max(round_seconds, 1e-6)
    return max(least, min(most, int((seconds - round_seconds) / round_seconds)))


@contextmanager
def _no_collector() -> Iterator[None]:
    """A collection in the middle of a sample would be charged to whoever runs then."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def interleave(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    warmup: int = 2,
    settle: int = 0,
    inner: int = 1,
    blocks: Mapping[str, int] = MappingProxyType({}),
    before: Mapping[str, Call] = MappingProxyType({}),
    clock: Callable[[], int] = perf_counter_ns,
) -> dict[str, list[float]]:
    """Milliseconds of ``rounds * inner`` samples of each call.

    Every round gives each call one turn, in an order drawn anew so that no call always follows the same other. A turn is ``settle``
    untimed calls, which bring the call's own data back into the caches where it fits; then ``inner`` samples, each the mean of
    ``blocks[name]`` timed calls (1 where it names none). ``before[name]`` runs before every call of a turn, untimed.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    with _no_collector():
        for name in order:
            for _ in range(warmup):
                calls[name]()
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                call, prepare, block = calls[name], before.get(name), blocks.get(name, 1)
                for _ in range(settle):
                    if prepare is not None:
                        prepare()
                    call()
                for _ in range(inner):
                    samples[name].append(_mean_ms(call, prepare, block, clock))
    return samples


def _mean_ms(call: Call, prepare: Call | None, block: int, clock: Callable[[], int]) -> float:
    if prepare is None:
        start = clock()
        for _ in range(block):
            call()
        return (clock() - start) / 1e6 / block
    total = 0
    for _ in range(block):
        prepare()
        start = clock()
        call()
        total += clock() - start
    return total / 1e6 / block
