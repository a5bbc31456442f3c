"""The ascent and the way back."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sam_kernels.operations._operation import ANY, NOT_NEGATIVE, Access, Limits, Number, Operation
from sam_kernels.operations.norms import Adaptive

__all__ = ["Perturb", "RandomPerturb", "Restore"]


def _from_old(accesses: dict[str, Access], from_old: bool) -> dict[str, Access]:
    return accesses | {"params": Access.WRITTEN, "old_params": Access.READ} if from_old else accesses


@dataclass(frozen=True, slots=True, kw_only=True)
class Perturb(Adaptive):
    """old_params <- params, then params <- params + rho (1 - lambd + lambd / (norm + eps)) d.

    d is the gradient; with a list ``ema`` it is grad_weight g / grad_scale + ema_weight m (without g where its weight is 0), and ``norm``
    is that of d. See :func:`sam_kernels.functional.perturb_`.
    """

    name: ClassVar[str] = "perturb_"
    roles: ClassVar = {"params": Access.UPDATED, "grads": Access.READ, "old_params": Access.WRITTEN, "ema": Access.READ}
    limits: ClassVar = Adaptive.limits | {"rho": ANY, "lambd": Limits(0.0, 1.0), "eps": NOT_NEGATIVE}

    norm: Tensor  # ()
    rho: Number
    lambd: Number = 1.0
    eps: float = 1e-12
    grad_scale: Tensor | None = None  # ()
    found_inf: Tensor | None = None  # ()
    from_old: bool = False
    grad_weight: float = 0.0
    ema_weight: float = 1.0
    rounding_seed: int | None = None

    @classmethod
    def accesses(cls, given: Collection[str], *, from_old: bool = False) -> dict[str, Access]:
        return _from_old(super(Perturb, cls).accesses(given), from_old)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomPerturb(Operation):
    """old_params <- params, then params <- params + scale z. See :func:`sam_kernels.functional.random_perturb_`."""

    name: ClassVar[str] = "random_perturb_"
    roles: ClassVar = {"params": Access.UPDATED, "old_params": Access.WRITTEN}
    limits: ClassVar = {"scale": ANY}

    seed: int
    scale: Number
    distribution: str
    from_old: bool = False

    @classmethod
    def accesses(cls, given: Collection[str], *, from_old: bool = False) -> dict[str, Access]:
        return _from_old(super(RandomPerturb, cls).accesses(given), from_old)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore(Operation):
    """params <- old_params, bit for bit where the dtypes agree."""

    name: ClassVar[str] = "restore_"
    roles: ClassVar = {"params": Access.WRITTEN, "old_params": Access.READ}
