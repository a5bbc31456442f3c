"""Radii that follow the training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sam_kernels._validate import check_number
from sam_kernels.schedules._radius import AscentInfo, Radius, between

__all__ = ["InverseNorm", "LRProportional"]


@dataclass(frozen=True)
class InverseNorm(Radius):
    """ρ_t = σ / ‖d‖, at most ρ_max: the longer the gradient, the shorter the perturbation.

    ‖d‖ is ``AscentInfo.norm``, of what the ascent goes along. With λ = 1, e = σ d / ‖d‖², by which the loss changes by σ to first order
    where d is its gradient. A norm of 0 makes ρ_t = 0. The radius is a tensor on the device, so that nothing waits.

    Args:
        sigma: σ ≥ 0, in the loss's unit where λ = 1.
        rho_max: ρ_max ≥ 0; None: there is none, and ρ_t grows without a bound where the gradient vanishes.

    Raises:
        TypeError, ValueError: for what is none of these.
    """

    sigma: float
    rho_max: float | None = None

    def __post_init__(self) -> None:
        check_number("InverseNorm", "sigma", self.sigma, low=0.0)
        if self.rho_max is not None:
            check_number("InverseNorm", "rho_max", self.rho_max, low=0.0)

    def radius(self, info: AscentInfo) -> Tensor:
        """Of the norm alone. float64: a norm of float32 may be so small that its inverse is none."""
        radius = (self.sigma / info.norm.to(torch.float64)).masked_fill(info.norm == 0.0, 0.0)
        return radius if self.rho_max is None else radius.clamp(max=self.rho_max)


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
