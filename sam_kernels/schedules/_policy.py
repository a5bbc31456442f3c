"""SAM where gradients are long for the course of training, decided from the norms of earlier steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sam_kernels._reading import Reading
from sam_kernels._validate import check_count, check_number
from sam_kernels.schedules._at_step import RhoSchedule, check_schedule, is_ascending, radius_at, resolved_at
from sam_kernels.schedules._radius import AscentInfo, Radius

__all__ = ["AdaptivePolicy"]


class AdaptivePolicy(Radius):
    """``rho`` in steps that follow a long gradient, plain steps of the base otherwise: AE-SAM, decided ``delay`` steps late.

    Source: Jiang et al., An Adaptive Policy to Employ Sharpness-Aware Minimization (arXiv 2304.14647). With n_t = ‖∇f(w_t)‖² of every
    step::

        m_t = decay m_{t-1} + (1 - decay) n_t,   v_t = decay v_{t-1} + (1 - decay) (n_t - m_t)²,   m_1 = n_1, v_1 = 0
        step t + delay is one of SAM where n_t ≥ m_t + c sqrt(v_t)

    The paper decides step t by n_t itself, which costs every step the norm of its gradient and a wait for it. Here whether a step ascends
    is decided before it begins. The first ``delay`` steps are of SAM. A step that had no gradient counts for nothing, and so does one
    whose norm's fourth power, which v has, leaves float64's range: beyond about 1e77, or below 1e-81.

    A plain step takes the norm of its gradient: 1 N s. With ``delay`` = 1 the host waits at each step until the gradient of the step
    before is known, on a device; with 2 it may queue one step ahead. No decision depends on how fast the device is.

    An object belongs to one training run. Give the same one to all groups that ascend, as ``rho=`` of the optimizer does. The object keeps
    n, m and v, and no checkpoint of the optimizer holds them: save :meth:`state_dict` beside it.

    Args:
        rho: what ``rho=`` of an optimizer takes: a number, a string, a callable or a :class:`Radius`, such as :class:`Tail`.
        decay: of the moving averages, in [0, 1).
        c: how many standard deviations above its average a squared norm must be; any number, or a callable t → c.
        delay: ≥ 1.

    Raises:
        TypeError, ValueError: for what is none of these; by the optimizer, for ``capturable=True``, a local ascent, several radii, or
            a direction that is not the gradient, whose norm would be another one in plain steps.
    """

    def __init__(self, rho: RhoSchedule, *, decay: float = 0.9, c: float | Callable[[int], float] = 0.0, delay: int = 1) -> None:
        op = "AdaptivePolicy"
        if isinstance(rho, AdaptivePolicy):
            raise TypeError(f"{op}: rho must be another radius, not an {op}")
        check_schedule("rho", rho, 1)
        self.rho = rho
        self.decay = check_number(op, "decay", decay, low=0.0, high=1.0, open_high=True)
        self.c = c if callable(c) else check_number(op, "c", c)
        self.delay = check_count(op, "delay", delay, low=1)
        self._pending: deque[tuple[int, Reading]] = deque()  # by step, those that have not decided anything yet
        self._mean: float | None = None
        self._variance = 0.0
        self._ascends = True
        self._resolved: tuple[int, float | Tensor | Radius] = 0, 0.0  # the step that was asked for last, and rho's part in it

    def __repr__(self) -> str:
        return f"AdaptivePolicy({self.rho!r}, decay={self.decay!r}, c={self.c!r}, delay={self.delay!r})"

    @property
    def observer(self) -> AdaptivePolicy:
        """This object, which is to be shown the norm of every step."""
        return self

    def observe(self, t: int, norm: Tensor) -> None:  # ()
        """Takes the norm of step t, without waiting for it. Another one of the same step takes the place of the first."""
        while self._pending and self._pending[-1][0] >= t:
            self._pending.pop()
        self._pending.append((t, Reading(norm)))

    def takes_part(self, t: int) -> bool:
        """Where the norms up to step t - delay have decided so, and ``rho`` takes part."""
        return is_ascending(self.at_step(t))

    def at_step(self, t: int) -> Any:
        """This radius, which is to see the norm, or 0.0. ``rho`` is asked here, once, where it is a function of the step."""
        while self._pending and self._pending[0][0] <= t - self.delay:
            self._learn(*self._pending.popleft())
        self._resolved = t, resolved_at(self.rho, t) if self._ascends else 0.0
        return self if is_ascending(self._resolved[1]) else 0.0

    def radius(self, info: AscentInfo) -> float | Tensor:
        """``rho``'s."""
        if isinstance(info.t, Tensor):
            raise TypeError("AdaptivePolicy: with capturable=True no step can be left out, since a graph makes the same one every time")
        self.observe(info.t, info.norm)
        t, resolved = self._resolved
        return radius_at(resolved if t == info.t else self.rho, info)

    def _learn(self, t: int, reading: Reading) -> None:
        norm = reading.value()
        square = norm * norm  # inf where it overflows, where ** raises OverflowError
        if not 0.0 < square * square < math.inf:
            return
        if self._mean is None:
            self._mean = square
        self._mean = _moving_average(self._mean, square, self.decay)
        difference = square - self._mean
        self._variance = _moving_average(self._variance, difference * difference, self.decay)
        c = check_number("AdaptivePolicy", f"c({t})", self.c(t)) if callable(self.c) else self.c
        self._ascends = square >= self._mean + c * math.sqrt(self._variance)

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """What is known of the run. Waits for norms that are on their way."""
        pending = [(t, reading.value()) for t, reading in self._pending]
        return {"mean": self._mean, "variance": self._variance, "ascends": self._ascends, "pending": pending}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues a run from what :meth:`state_dict` gave. Raises KeyError for another dictionary."""
        mean, variance, ascends, pending = (state_dict[key] for key in ("mean", "variance", "ascends", "pending"))
        self._mean, self._variance, self._ascends = mean, variance, ascends
        self._pending = deque((t, Reading(torch.tensor(norm, dtype=torch.float64, device="cpu"))) for t, norm in pending)

    def __getstate__(self) -> dict[str, Any]:
        return {"options": (self.rho, self.decay, self.c, self.delay), "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.rho, self.decay, self.c, self.delay = state["options"]
        self._resolved = 0, 0.0
        self.load_state_dict(state["state"])


def _moving_average(average: float, value: float, decay: float) -> float:
    """decay average + (1 - decay) value, in the forms of torch.lerp: exactly ``average`` where both are equal. For a decay below 1/2 the
    first form would err by half an ulp of an average that may be far longer than the result."""
    difference = value - average
    return average + (1.0 - decay) * difference if decay >= 0.5 else value - decay * difference
