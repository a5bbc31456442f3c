"""What the directions and the descent rules of the SAM family are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sam_kernels.operations._operation import ANY, Access, Limits, Number, Operation
from sam_kernels.operations.norms import Adaptive

__all__ = ["Centralize", "Combine", "DirectionNorm", "GradDots"]

ABOVE_0_TO_1 = Limits(0.0, 1.0, open_low=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionNorm(Adaptive):
    """Updates the moving averages ``ema``. See :func:`sam_kernels.functional.direction_norm_`.

    ``first_step``: the averages are only written. A backend returns () float64, the norm of the direction.
    """

    name: ClassVar[str] = "direction_norm_"
    roles: ClassVar = {"grads": Access.READ, "ema": Access.UPDATED, "params": Access.READ}
    limits: ClassVar = Adaptive.limits | {"theta": ABOVE_0_TO_1, "sigma": ANY, "lmbda": ABOVE_0_TO_1}

    kind: str
    first_step: bool = False
    theta: float = 0.9
    sigma: float = 1.0
    lmbda: float = 0.6
    grad_scale: Tensor | None = None  # ()

    @property
    def decay(self) -> float:
        """The weight of the old average in the new one."""
        return self.lmbda if self.kind == "friendly" else 1.0 - self.theta

    @property
    def gain(self) -> float:
        """The weight of the gradient in the new average."""
        return 1.0 - self.lmbda if self.kind == "friendly" else self.theta


@dataclass(frozen=True, slots=True, kw_only=True)
class GradDots(Operation):
    """(sum l^2, sum l d, sum d^2), d = r - o, or r without origins. A backend returns (3,) float64 and reports it to ``found_inf``."""

    name: ClassVar[str] = "grad_dots"
    roles: ClassVar = {"lefts": Access.READ, "rights": Access.READ, "origins": Access.READ}
    reports: ClassVar = ("found_inf",)

    found_inf: Tensor | None = None  # ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Combine(Operation):
    """out <- left_weight l + (right_weight r + origin_weight o). A backend returns the norm of that, () float32 (float64 where an out is
    float64), and reports it to ``found_inf``, which it reads first."""

    name: ClassVar[str] = "combine_"
    roles: ClassVar = {"outs": Access.WRITTEN, "lefts": Access.READ, "rights": Access.READ, "origins": Access.READ}
    limits: ClassVar = {"left_weight": ANY, "right_weight": ANY, "origin_weight": ANY}
    reports: ClassVar = ("found_inf",)

    left_weight: Number
    right_weight: Number
    origin_weight: Number = 0.0
    found_inf: Tensor | None = None  # ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Centralize(Adaptive):
    """g <- g minus its mean over all dimensions but the first. A backend returns the norm of what is left, () float32 (float64 where a
    gradient is float64), and reports it to ``found_inf``. Slices along the first dimension are runs of memory."""

    name: ClassVar[str] = "centralize_"
    roles: ClassVar = {"grads": Access.UPDATED, "params": Access.READ}
    reports: ClassVar = ("found_inf",)

    found_inf: Tensor | None = None  # ()
