"""Times several callables in one process, taking turns, so that a disturbance of the machine meets all of them."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns
from types import MappingProxyType

import numpy as np

__all__ = ["Quantiles", "interleave", "quantiles"]

Call = Callable[[], object]


@dataclass(frozen=True)
class Quantiles:
    """Milliseconds below which 20, 50 and 80 % of the samples lie."""

    ms_20: float
    ms_50: float
    ms_80: float


def quantiles(samples_ms: list[float]) -> Quantiles:
    return Quantiles(*(float(q) for q in np.quantile(samples_ms, (0.2, 0.5, 0.8))))


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
    before: Mapping[str, Call] = MappingProxyType({}),
    clock: Callable[[], int] = perf_counter_ns,
) -> dict[str, list[float]]:
    """Milliseconds of ``rounds * inner`` samples of each call.

    Every round gives each call one turn, in an order drawn anew so that no call always follows the same other. A turn is what stands in
    ``before`` for it, untimed, where something does; ``settle`` untimed calls, which bring the call's own data back into the caches where
    it fits; then ``inner`` timed ones.
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
                call = calls[name]
                if name in before:
                    before[name]()
                for _ in range(settle):
                    call()
                for _ in range(inner):
                    start = clock()
                    call()
                    samples[name].append((clock() - start) / 1e6)
    return samples
