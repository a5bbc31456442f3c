"""Which clock a measurement of this package uses."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns, thread_time_ns

import torch

__all__ = ["best_clock"]


def best_clock() -> Callable[[], int]:
    """With one thread its own time on a processor, so that other processes count less; otherwise the time of day."""
    return thread_time_ns if torch.get_num_threads() == 1 else perf_counter_ns
