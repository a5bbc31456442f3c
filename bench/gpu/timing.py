"""Device time of calls that take turns, and beside it the time the host needs to launch them.

A sample is the time between two events on the device with ``inner`` calls between them. Before the first event the queue is filled: the
device sleeps while the host runs ahead, so that gaps between launches do not count for calls that the device finishes faster than the host
can launch them. A call that waits for the device by itself cannot be launched ahead: its waiting is part of its time.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import numpy as np
import torch

from bench.timing import Quantiles, quantiles

__all__ = ["Clock", "DeviceClock", "HostClock", "Timed", "interleave", "launch_us", "settle", "wall_ms"]

Call = Callable[[], object]
SLEEP_LIMIT = 0.04  # seconds
CYCLES_PER_SECOND = 1.9e9  # of the device's sleep; only the order of magnitude matters
SAMPLE_MS = 0.3  # a sample is at least this long where up to MAX_INNER calls can make it so
MAX_INNER = 20
WALL_SECONDS = 0.02  # that a turn by the wall clock is at least to take
MOST_CALLS = 200  # of one


@dataclass
class Timed:
    """Milliseconds of one call, sample by sample."""

    device_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)

    @property
    def device(self) -> Quantiles:
        return quantiles(self.device_ms)

    @property
    def host_us(self) -> float:
        return float(np.median(self.host_ms)) * 1000

    def extend(self, other: Timed) -> None:
        self.device_ms += other.device_ms
        self.host_ms += other.host_ms


class Clock(Protocol):
    def wait(self) -> None:
        """Until all work is done."""
        ...

    def turn(self, call: Call, samples: int, inner: int, host_seconds: float) -> Timed:
        """Some samples in a row. ``host_seconds``: what launching all of them is expected to take."""
        ...


class DeviceClock:
    """By CUDA events."""

    def wait(self) -> None:
        torch.cuda.synchronize()

    def turn(self, call: Call, samples: int, inner: int, host_seconds: float) -> Timed:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
        torch.cuda.synchronize()
        torch.cuda._sleep(int(min(SLEEP_LIMIT, 1.3 * host_seconds + 2e-5) * CYCLES_PER_SECOND))
        start = perf_counter()
        events[0].record()
        for event in events[1:]:
            for _ in range(inner):
                call()
            event.record()
        host = (perf_counter() - start) * 1000 / (samples * inner)
        torch.cuda.synchronize()
        return Timed([a.elapsed_time(b) / inner for a, b in itertools.pairwise(events)], [host])


class HostClock:
    """For a dry run without a device."""

    def wait(self) -> None:
        pass

    def turn(self, call: Call, samples: int, inner: int, host_seconds: float) -> Timed:
        timed = Timed()
        for _ in range(samples):
            start = perf_counter()
            for _ in range(inner):
                call()
            timed.device_ms.append((perf_counter() - start) * 1000 / inner)
        return Timed(timed.device_ms, list(timed.device_ms))


def settle(clock: Clock, call: Call, *, most: int = 12, within: float = 0.03) -> Timed:
    """Calls until two turns in a row agree within 3 % (compiling, allocating and clocks are over): the last turn."""
    previous, latest = math.inf, Timed([math.inf])
    for i in range(most):
        latest = clock.turn(call, 3, 1, 0.0)
        median = latest.device.ms_50
        if i > 1 and abs(median - previous) <= within * previous:
            break
        previous = median
    return latest


def interleave(clock: Clock, calls: Mapping[str, Call], *, seconds: float, rounds: tuple[int, int] = (4, 25)) -> dict[str, Timed]:
    """Every round gives each call one turn, in an order drawn anew; as many rounds, within the limits, as fill the seconds."""
    first = {name: settle(clock, call) for name, call in calls.items()}
    per_turn, inner = 3, {}
    for name, timed in first.items():
        inner[name] = max(1, min(MAX_INNER, math.ceil(SAMPLE_MS / max(timed.device.ms_50, 1e-4))))
    one_round = sum(max(t.device.ms_50, t.host_us / 1000) * per_turn * inner[name] for name, t in first.items()) / 1000
    count = max(rounds[0], min(rounds[1], int(seconds / max(one_round, 1e-9))))
    found = {name: Timed() for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for _ in range(count):
            shuffle(order)
            for name in order:
                expected = first[name].host_us * 1e-6 * per_turn * inner[name]
                found[name].extend(clock.turn(calls[name], per_turn, inner[name], expected))
    finally:
        gc.enable()
    return found


def _rounds(calls: Mapping[str, Call], count: int, turn: Callable[[str], float]) -> dict[str, float]:
    """The median of each call's turns, taken in an order drawn anew each round."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for _ in range(count):
            shuffle(order)
            for name in order:
                found[name].append(turn(name))
    finally:
        gc.enable()
    return {name: float(np.median(values)) for name, values in found.items()}


def wall_ms(clock: Clock, calls: Mapping[str, Call], expected: Mapping[str, Timed], *, rounds: int = 5) -> dict[str, float]:
    """Milliseconds of a call after another by the host's clock: what a loop of them takes, whoever is the slower of host and device."""

    def turn(name: str) -> float:
        once = max(expected[name].device.ms_50 / 1000, expected[name].host_us * 1e-6, 1e-6)
        count = max(2, min(MOST_CALLS, math.ceil(WALL_SECONDS / once)))
        clock.wait()
        start = perf_counter()
        for _ in range(count):
            calls[name]()
        clock.wait()
        return (perf_counter() - start) * 1000 / count

    return _rounds(calls, rounds, turn)


def launch_us(clock: Clock, calls: Mapping[str, Call], *, rounds: int = 30) -> dict[str, float]:
    """Microseconds until a call returns that finds the device idle: the host's work alone, as its queue is never full."""

    def turn(name: str) -> float:
        clock.wait()
        start = perf_counter()
        calls[name]()
        return (perf_counter() - start) * 1e6

    return _rounds(calls, rounds, turn)
