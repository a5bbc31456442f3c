"""The operations of the Triton backend. Importing this module needs triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sam_kernels.backends.triton.adamw import adamw_step_
from sam_kernels.backends.triton.centralize import centralize_
from sam_kernels.backends.triton.combine import combine_
from sam_kernels.backends.triton.direction import direction_norm_
from sam_kernels.backends.triton.dots import grad_dots
from sam_kernels.backends.triton.norm import check_finite_, grad_norms
from sam_kernels.backends.triton.perturb import perturb_, restore_
from sam_kernels.backends.triton.random import random_perturb_
from sam_kernels.backends.triton.sgd import sgd_step_
from sam_kernels.operations import (
    AdamWStep,
    Centralize,
    CheckFinite,
    Combine,
    DirectionNorm,
    GradDots,
    GradNorms,
    Operands,
    Operation,
    Perturb,
    RandomPerturb,
    Restore,
    SgdStep,
)

__all__ = ["OPERATIONS"]

OPERATIONS: dict[type[Operation], Callable[[Any, Operands], Any]] = {
    AdamWStep: adamw_step_,
    Centralize: centralize_,
    CheckFinite: check_finite_,
    Combine: combine_,
    DirectionNorm: direction_norm_,
    GradDots: grad_dots,
    GradNorms: grad_norms,
    Perturb: perturb_,
    RandomPerturb: random_perturb_,
    Restore: restore_,
    SgdStep: sgd_step_,
}
