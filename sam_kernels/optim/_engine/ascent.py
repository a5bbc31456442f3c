"""What a direction makes of the gradients, as the passes take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sam_kernels.optim._engine.lists import GroupGrads

__all__ = ["Move", "PerturbOptions"]


@dataclass(frozen=True, slots=True)
class PerturbOptions:
    """How :func:`sam_kernels.functional.perturb_` finds d of one group again: d = g unless a field says otherwise.

    ``is_scaled``: the group's ``grads`` and the norm are multiplied by the loss scale, as gradients are. With ``ema`` d is made from g and
    that list by ``kind``, ``sigma`` and ``lmbda``; it is never multiplied by the loss scale, and neither is its norm. Where ``rests`` is
    set, w + e is w.
    """

    is_scaled: bool = True
    ema: list[Tensor | None] | None = None  # one for each parameter; None where d = g
    kind: str | None = None
    sigma: float = 1.0
    lmbda: float = 0.6
    rests: Tensor | None = None  # () float32 on the device


class Move(NamedTuple):
    """Along what a group that participates ascends."""

    current: GroupGrads
    along: PerturbOptions
    is_downhill: bool  # w - rho d
