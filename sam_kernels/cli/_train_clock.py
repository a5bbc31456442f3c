"""Where a step's time goes: into gradients, or into the optimizer's own arithmetic."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator

import torch

__all__ = ["StepClock"]


class StepClock:
    """Times steps, and within each its gradients: one computation for a plain step, two for a sharpness-aware one."""

    def __init__(self, device: torch.device) -> None:
        self.steps: list[float] = []  # seconds
        self.gradients: list[float] = []  # seconds of each step inside gradient()
        self._device = device

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        self.gradients.append(0.0)
        start = self._now()
        yield
        self.steps.append(self._now() - start)

    @contextlib.contextmanager
    def gradient(self) -> Iterator[None]:
        start = self._now()
        yield
        self.gradients[-1] += self._now() - start

    def median(self) -> float:
        return statistics.median(self.steps)

    def median_optimizer_share(self) -> float:
        return statistics.median(1.0 - gradient / step for gradient, step in zip(self.gradients, self.steps, strict=True))

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()
