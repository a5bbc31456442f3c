"""Bytes a parameter, everything counted: weights, gradients, masters, state, and what a step allocates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile

from bench.memory import reachable_tensors

__all__ = ["MIXED_PRECISION", "MemoryOf", "bytes_of"]

# Of mixed-precision training with the base alone: weights, gradients, masters, and float32 state.
MIXED_PRECISION = {"sgd": 2 + 2 + 4 + 4, "adamw": 2 + 2 + 4 + 8}


class MemoryOf(NamedTuple):
    """Bytes a parameter."""

    between: float
    peak: float


def bytes_of(optimizer: object, step: Callable[[], object], numel: int) -> MemoryOf:
    """Between steps, by the storages that the optimizer holds; at the peak of a step, that and what torch's allocator hands out in it.

    Step counters, norms and flags, a few bytes a tensor, are left out.
    """
    storages = [tensor.untyped_storage() for tensor in reachable_tensors(optimizer) if tensor.dim() > 0]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    return MemoryOf(held / numel, (held + _peak_of_allocations(step)) / numel)


_SCALAR = 8  # bytes


def _peak_of_allocations(step: Callable[[], object]) -> int:
    """How far the bytes in use rise within a step; scalars are left out."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    results: Any = found.profiler
    in_use = peak = 0
    for event in sorted((e for e in results.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        in_use += event.nbytes() if abs(event.nbytes()) > _SCALAR else 0
        peak = max(peak, in_use)
    return peak
