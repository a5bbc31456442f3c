"""The operations of the Triton backend. Importing this module needs triton."""

from __future__ import annotations

from sam_kernels.backends.triton.adamw import adamw_step_
from sam_kernels.backends.triton.centralize import centralize_
from sam_kernels.backends.triton.combine import combine_
from sam_kernels.backends.triton.direction import direction_norm_
from sam_kernels.backends.triton.dots import grad_dots
from sam_kernels.backends.triton.norm import check_finite_, grad_norms
from sam_kernels.backends.triton.perturb import perturb_, restore_
from sam_kernels.backends.triton.random import random_perturb_
from sam_kernels.backends.triton.sgd import sgd_step_

__all__ = [
    "adamw_step_", "centralize_", "check_finite_", "combine_", "direction_norm_", "grad_dots", "grad_norms", "perturb_", "random_perturb_",
    "restore_", "sgd_step_",
]  # fmt: skip
