"""The hook for radii that follow the training: what they are told, and what they answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["AscentInfo", "Radius", "between"]


@dataclass(frozen=True)
class AscentInfo:
    """What is known when a parameter group is about to ascend. Reading a tensor of it on the host would wait for the device.

    Attributes:
        t: the step 1, 2, …; with ``capturable=True`` a () float64 tensor on the parameters' device.
        group: the parameter group, to be read: its ``lr``, ``initial_lr`` (where a scheduler has set it), ``weight_decay``, …
        norm: () float32 (float64 where a gradient is) on the device: ‖d‖ over all groups that take part, ‖T d‖ where ``adaptive``, with
            d what the ascent goes along: the gradient, the moving average of VaSSO, the momentum of Momentum-SAM, …; of the loss
            itself, without a ``GradScaler``'s scale.
        loss: what the first closure returned: a number, a () tensor without its graph, or None where that is neither, in the two-step
            API, which sees no loss, and for Momentum-SAM, which ascends before its only pass.
    """

    t: int | Tensor
    group: Mapping[str, Any]
    norm: Tensor
    loss: float | Tensor | None


class Radius(ABC):
    """A radius that follows the training: give an instance as ``rho=``, to an optimizer or to a parameter group.

    A function of the step alone needs none of this: give the function.
    """

    @abstractmethod
    def radius(self, info: AscentInfo) -> float | Tensor:
        """ρ ≥ 0 of this step: a number, or a tensor of one element, float32 or float64 (always one with ``capturable=True``: a number would
        be a constant of the graph). Called once for each ascent of each group, before any weight is moved: once a step, and in m-SAM once
        for each micro-batch, which has a norm and a loss of its own.

        A tensor on the device is never read by the host. Where ``info.norm`` is not finite the step is skipped, whatever this returns.
        """

    def takes_part(self, t: int) -> bool:
        """Whether the group ascends in step t, which must be known before there is a gradient: if not, its gradient is in no norm, and
        where no group ascends the closure runs once. Asked once a step and group; not asked with ``capturable=True``: there it does.
        """
        return True

    @property
    def observer(self) -> Any:
        """The radius that is to be shown the norm of every step, None for one that looks at those of its own ascents alone."""
        return None

    def at_step(self, t: int) -> Any:
        """What is known of ρ_t before there is a gradient: 0.0 where the group rests in step t, a number, or the radius to ask later."""
        return self if self.takes_part(t) else 0.0


def between(first: float, last: float, way: float | Tensor) -> float | Tensor:
    """Return the number at ``way`` from ``first`` (0) to ``last`` (1): exact at both ends, never beyond them."""
    way = way.clamp(0.0, 1.0) if isinstance(way, Tensor) else min(max(way, 0.0), 1.0)
    return first * (1 - way) + last * way
