"""Restore and update in one pass."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sam_kernels.operations._operation import Access, Number, Operation

__all__ = ["AdamWStep", "SgdStep"]


def _from_params(accesses: dict[str, Access], given: Collection[str]) -> dict[str, Access]:
    """Without backups the update starts from the parameters themselves."""
    return accesses if "old_params" in given else accesses | {"params": Access.UPDATED}


@dataclass(frozen=True, slots=True, kw_only=True)
class SgdStep(Operation):
    """``torch.optim.SGD`` from old_params (where given) to params. See :func:`sam_kernels.functional.sgd_step_`.

    ``first_step``: momentum buffers are only written. A backend returns whether the step was made; True where only the device knows.
    """

    name: ClassVar[str] = "sgd_step_"
    roles: ClassVar = {
        "params": Access.WRITTEN,
        "grads": Access.READ,
        "old_params": Access.READ,
        "momentum_buffers": Access.UPDATED,
    }
    numbers: ClassVar = ("lr",)
    scalars: ClassVar = ("grad_scale", "found_inf", "norm")

    lr: Number
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    first_step: bool = False
    grad_scale: Tensor | None = None  # ()
    found_inf: Tensor | None = None  # ()
    norm: Tensor | None = None  # ()
    max_norm: float | None = None

    @classmethod
    def accesses(cls, given: Collection[str]) -> dict[str, Access]:
        return _from_params(super(SgdStep, cls).accesses(given), given)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWStep(Operation):
    """``torch.optim.AdamW`` (``decoupled``) or ``Adam`` from old_params (where given) to params. See
    :func:`sam_kernels.functional.adamw_step_`.

    The operands have one list more, ``state_steps``: n counters of one element, on any device, each one larger afterwards unless the step
    is skipped. A backend returns whether the step was made; True where only the device knows.
    """

    name: ClassVar[str] = "adamw_step_"
    roles: ClassVar = {
        "params": Access.WRITTEN,
        "grads": Access.READ,
        "old_params": Access.READ,
        "exp_avgs": Access.UPDATED,
        "exp_avg_sqs": Access.UPDATED,
    }
    numbers: ClassVar = ("lr",)
    scalars: ClassVar = ("grad_scale", "found_inf", "norm")

    lr: Number
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True
    maximize: bool = False
    grad_scale: Tensor | None = None  # ()
    found_inf: Tensor | None = None  # ()
    norm: Tensor | None = None  # ()
    max_norm: float | None = None

    @classmethod
    def accesses(cls, given: Collection[str]) -> dict[str, Access]:
        return _from_params(super(AdamWStep, cls).accesses(given), given)
