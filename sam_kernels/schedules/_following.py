"""Radii that follow the training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sam_kernels._validate import check_number
from sam_kernels.schedules._radius import AscentInfo, Radius, between

__all__ = ["LRProportional"]


@dataclass(frozen=True)
class LRProportional(Radius):
    """ρ_t = ρ_min + (ρ_max - ρ_min) (lr_t - lr_min) / (lr_max - lr_min), within [ρ_min, ρ_max]: whatever moves ``lr`` moves the radius.

    GSAM's rule, arXiv 2203.08065. The group's own ``lr`` is read; a tensor makes a tensor, on its device, and is needed with
    ``capturable=True``.

    Args:
        rho_max, rho_min: 0 ≤ ρ_min ≤ ρ_max.
        lr_max, lr_min: learning rates at which these are reached, 0 ≤ lr_min < lr_max.

    Raises:
        TypeError, ValueError: for what is none of these.
    """

    rho_max: float
    rho_min: float
    lr_max: float
    lr_min: float

    def __post_init__(self) -> None:
        op = "LRProportional"
        rho_max = check_number(op, "rho_max", self.rho_max, low=0.0)
        check_number(op, "rho_min", self.rho_min, low=0.0, high=rho_max)
        lr_max = check_number(op, "lr_max", self.lr_max, low=0.0, open_low=True)
        check_number(op, "lr_min", self.lr_min, low=0.0, high=lr_max, open_high=True)

    def radius(self, info: AscentInfo) -> float | Tensor:
        """Of the group's ``lr`` alone."""
        lr: float | Tensor = info.group["lr"]
        return between(self.rho_min, self.rho_max, (lr - self.lr_min) / (self.lr_max - self.lr_min))
