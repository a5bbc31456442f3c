"""The specification: every public operation in plain PyTorch, as the formulas read. Imports torch alone; never on the training path."""

from sam_kernels.reference.centralize import centralize_
from sam_kernels.reference.combinations import combine_, grad_dots
from sam_kernels.reference.directions import direction_norm_
from sam_kernels.reference.norms import grad_norm, grad_norms
from sam_kernels.reference.ops import adamw_step_, perturb_, restore_, sgd_step_
from sam_kernels.reference.random import random_perturb_
from sam_kernels.reference.sharpness import sharpness_sample, sharpness_weights

__all__ = [
    "adamw_step_", "centralize_", "combine_", "direction_norm_", "grad_dots", "grad_norm", "grad_norms", "perturb_", "random_perturb_",
    "restore_", "sgd_step_", "sharpness_sample", "sharpness_weights",
]  # fmt: skip
