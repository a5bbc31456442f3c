"""Where a step's time goes: into forward passes, into backward passes, or into the optimizer's own work."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["StepClock", "StepTime"]


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: ``forward`` + ``backward`` + ``rest`` = ``step``."""

    step: float
    forward: float  # all forward passes
    backward: float  # all that autograd does
    rest: float  # the optimizer's own work


class StepClock:
    """Times steps, and within each what its forward and its backward passes take: one of both for a plain step, two or more for others.

    A backward pass that an optimizer makes by itself is timed by autograd's engine: from the watched loss on until the pass is over.
    """

    def __init__(self, device: torch.device) -> None:
        self.steps: list[float] = []  # seconds
        self.forwards: list[float] = []  # seconds of each step inside forward()
        self.backwards: list[float] = []  # seconds of each step inside backward(), or from a watched loss on
        self._device = device

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        self.forwards.append(0.0)
        self.backwards.append(0.0)
        start = self._now()
        yield
        self.steps.append(self._now() - start)

    def forward(self) -> contextlib.AbstractContextManager[None]:
        return self._timed_into(self.forwards)

    def backward(self) -> contextlib.AbstractContextManager[None]:
        return self._timed_into(self.backwards)

    def watch(self, loss: Tensor) -> None:
        """Times the backward passes through ``loss`` that somebody else is going to make. One without a graph has none."""
        if loss.requires_grad:
            loss.register_hook(self._backward_begins)  # type: ignore[no-untyped-call]  # torch's own is untyped

    def rests(self) -> list[float]:
        return [step - forward - backward for step, forward, backward in zip(self.steps, self.forwards, self.backwards, strict=True)]

    def mean(self) -> StepTime:
        """Return the totals over the steps after the first, which sets up, divided by their number. A single step is all there is."""
        first = min(1, len(self.steps) - 1)
        step, forward, backward = (statistics.fmean(seconds[first:]) for seconds in (self.steps, self.forwards, self.backwards))
        return StepTime(step, forward, backward, step - forward - backward)

    def median_step(self) -> float:
        """Return the median over all steps: neither the first step nor a busy moment of the machine counts."""
        return statistics.median(self.steps)

    def _backward_begins(self, _grad: Tensor) -> None:
        start = self._now()

        def ends() -> None:
            self.backwards[-1] += self._now() - start

        # The engine calls this when the pass that runs now is over. Nothing public tells that, but of a pass towards leaves.
        torch.autograd.Variable._execution_engine.queue_callback(ends)

    @contextlib.contextmanager
    def _timed_into(self, seconds: list[float]) -> Iterator[None]:
        start = self._now()
        yield
        seconds[-1] += self._now() - start

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()
