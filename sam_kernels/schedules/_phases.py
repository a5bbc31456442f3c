"""SAM in some of the steps only: the others are the base optimizer's, with one call of the closure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sam_kernels._validate import check_count, check_number_or_tensor
from sam_kernels.schedules._at_step import RhoSchedule, Step, is_ascending, radius_at, resolved_at, rho_at
from sam_kernels.schedules._radius import AscentInfo, Radius

__all__ = ["Interval", "Tail"]


class _Phases(Radius):
    """``rho`` in the steps that :meth:`_ascends` names, 0 in the others."""

    rho: RhoSchedule

    def _ascends(self, t: Step) -> bool | Tensor:
        raise NotImplementedError

    def _check_rho(self) -> None:
        """As far as it can be known without calling what is given."""
        if isinstance(self.rho, Radius) and self.rho.observer is not None:
            inner, outer = type(self.rho).__name__, type(self).__name__
            raise TypeError(f"{outer}: rho must not be {inner}, which looks at every step; write {inner}({outer}(...))")
        if isinstance(self.rho, str):
            rho_at(self.rho, 1)
        elif not (isinstance(self.rho, Radius) or callable(self.rho)):
            check_number_or_tensor(type(self).__name__, "rho", self.rho, low=0.0)

    def radius(self, info: AscentInfo) -> float | Tensor:
        """``rho``'s or 0; of a step that is a tensor, a tensor."""
        ascends = self._ascends(info.t)
        if isinstance(ascends, Tensor):
            value = radius_at(self.rho, info)
            value = value if isinstance(value, Tensor) else torch.full_like(info.norm, value, dtype=torch.float64)
            return value.to(ascends.device).masked_fill(~ascends, 0.0)  # a tensor that was given may be on the CPU
        return radius_at(self.rho, info) if ascends else 0.0

    def takes_part(self, t: int) -> bool:
        """In its steps, where ``rho`` does."""
        return is_ascending(self.at_step(t))

    def at_step(self, t: int) -> Any:
        """``rho`` is asked here, once, where it is a function of the step."""
        return resolved_at(self.rho, t) if self._ascends(t) else 0.0


@dataclass(frozen=True)
class Interval(_Phases):
    """``rho`` in every ``every``-th step, t = start + 1, start + 1 + every, …, and plain steps of the base between and before.

    With ``every`` = k the gradients of k steps cost k + 1 in place of 2 k. With ``capturable=True`` a step's kind is nothing the host
    knows: the closure runs twice in each, with ρ = 0 in the plain ones.

    Args:
        rho: what ``rho=`` of an optimizer takes: a number, a tensor, a string, a callable or another :class:`Radius`.
        every: ≥ 1; 1 is SAM in each step.
        start: plain steps before the first of SAM, ≥ 0.

    Raises:
        TypeError, ValueError: for what is none of these.
    """

    rho: RhoSchedule
    every: int
    start: int = 0

    def __post_init__(self) -> None:
        self._check_rho()
        check_count("Interval", "every", self.every, low=1)
        check_count("Interval", "start", self.start, low=0)

    def _ascends(self, t: Step) -> bool | Tensor:
        since = t - 1 - self.start
        return (since >= 0) & (since % self.every == 0)


@dataclass(frozen=True)
class Tail(_Phases):
    """``rho`` from step t = start + 1 on, plain steps of the base before: SAM in the last part of training. As :class:`Interval` otherwise.

    Args:
        rho: as there.
        start: plain steps before, ≥ 0.

    Raises:
        TypeError, ValueError: for what is none of these.
    """

    rho: RhoSchedule
    start: int

    def __post_init__(self) -> None:
        self._check_rho()
        check_count("Tail", "start", self.start, low=0)

    def _ascends(self, t: Step) -> bool | Tensor:
        return t > self.start
