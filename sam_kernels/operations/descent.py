"""Restore and update in one pass."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sam_kernels.operations._operation import ANY, NOT_NEGATIVE, Access, Number, Operation

__all__ = ["AdamWStep", "Descent", "SgdStep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent(Operation):
    """The base of updates from old_params (where given) to params; with ``to_old`` to both. A backend returns whether the step was made;
    True where only the device knows. ``rounding_seed``: bfloat16 params are rounded stochastically."""

    roles: ClassVar = {"params": Access.WRITTEN, "grads": Access.READ, "old_params": Access.READ}
    also_written: ClassVar = ("old_params",)
    limits: ClassVar = {"lr": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, "max_norm": NOT_NEGATIVE}

    lr: Number
    weight_decay: float = 0.0
    maximize: bool = False
    grad_scale: Tensor | None = None  # ()
    found_inf: Tensor | None = None  # ()
    norm: Tensor | None = None  # ()
    max_norm: float | None = None
    to_old: bool = False
    rounding_seed: int | None = None

    @classmethod
    def accesses(cls, given: Collection[str], *, to_old: bool = False) -> dict[str, Access]:
        """Without backups the update starts from the parameters themselves."""
        accesses = super(Descent, cls).accesses(given)
        if "old_params" not in given:
            return accesses | {"params": Access.UPDATED}
        return accesses | {"old_params": Access.UPDATED} if to_old else accesses

    @property
    def writes(self) -> tuple[str, ...]:
        """Backups only with ``to_old``."""
        return self.written if self.to_old else tuple(role for role in self.written if role not in self.also_written)


@dataclass(frozen=True, slots=True, kw_only=True)
class SgdStep(Descent):
    """``torch.optim.SGD``. See :func:`sam_kernels.functional.sgd_step_`. ``first_step``: momentum buffers are only written."""

    name: ClassVar[str] = "sgd_step_"
    roles: ClassVar = Descent.roles | {"momentum_buffers": Access.UPDATED}
    limits: ClassVar = Descent.limits | {"momentum": NOT_NEGATIVE, "dampening": ANY}

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    first_step: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWStep(Descent):
    """``torch.optim.AdamW`` (``decoupled``) or ``Adam``. See :func:`sam_kernels.functional.adamw_step_`.

    The operands have one list more, ``state_steps``: n counters of one element, on any device, each one larger afterwards unless the step
    is skipped.
    """

    name: ClassVar[str] = "adamw_step_"
    roles: ClassVar = Descent.roles | {"exp_avgs": Access.UPDATED, "exp_avg_sqs": Access.UPDATED}
    limits: ClassVar = Descent.limits | {"eps": NOT_NEGATIVE}

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decoupled: bool = True
