"""Norms and checks of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sam_kernels.operations._operation import NOT_NEGATIVE, Access, Operation

__all__ = ["Adaptive", "CheckFinite", "GradNorms"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptive(Operation):
    """The base of operations that multiply by ASAM's T = |p| + eta when ``adaptive``."""

    limits: ClassVar = {"eta": NOT_NEGATIVE}

    adaptive: bool = False
    eta: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GradNorms(Adaptive):
    """The norms of consecutive groups of rows: sqrt(sum g^2), or of T_w g with T_w = |p| + eta when ``adaptive``.

    A backend returns (len(group_sizes),) float32, float64 where a gradient is float64, in ``out`` where that is given. It reports one norm
    to ``found_inf`` and ``skipped``; of several norms these are None.
    """

    name: ClassVar[str] = "grad_norms"
    roles: ClassVar = {"grads": Access.READ, "params": Access.READ}
    reports: ClassVar = ("found_inf", "skipped")

    group_sizes: Sequence[int]  # rows
    found_inf: Tensor | None = None  # ()
    skipped: Tensor | None = None  # () float32 or float64
    out: Tensor | None = None  # () any floating dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckFinite(Operation):
    """``found_inf`` <- 1 where an element of the gradients is not finite."""

    name: ClassVar[str] = "check_finite_"
    roles: ClassVar = {"grads": Access.READ}
    reports: ClassVar = ("found_inf",)

    found_inf: Tensor  # ()
