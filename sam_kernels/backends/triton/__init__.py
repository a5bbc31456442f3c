"""Triton kernels: one launch an operation and dtype, on NVIDIA and AMD devices; under ``TRITON_INTERPRET=1``, slowly, on the CPU.

Can be imported where triton is missing: ``REASON_MISSING`` then says why nothing else is here. Arithmetic is float32; there are no kernels
for float64.
"""

from sam_kernels.backends.triton._requirements import DEVICE_TYPES, IS_INTERPRETED, REASON_MISSING, VERSION

if REASON_MISSING is None:
    from sam_kernels.backends.triton._lists import DTYPES, current_grads, is_current, vouch
    from sam_kernels.backends.triton.adamw import adamw_step_
    from sam_kernels.backends.triton.centralize import centralize_
    from sam_kernels.backends.triton.combine import combine_
    from sam_kernels.backends.triton.direction import direction_norm_
    from sam_kernels.backends.triton.dots import grad_dots
    from sam_kernels.backends.triton.norm import check_finite_, grad_norms
    from sam_kernels.backends.triton.perturb import perturb_, restore_
    from sam_kernels.backends.triton.random import random_perturb_
    from sam_kernels.backends.triton.sgd import sgd_step_

IS_AUTOMATIC = not IS_INTERPRETED  # the interpreter is for those who ask
KNOWS_SKIPS = False  # that would mean to wait for the device
REFUSES_NO_MEMORY = True


def describe() -> str:
    """One line for ``python -m sam_kernels info``."""
    return f"triton {VERSION}, {'interpreted' if IS_INTERPRETED else 'compiled for each device on first use'}"


__all__ = [
    "DEVICE_TYPES", "DTYPES", "IS_AUTOMATIC", "KNOWS_SKIPS", "REASON_MISSING", "REFUSES_NO_MEMORY",
    "adamw_step_", "centralize_",
    "check_finite_", "combine_", "current_grads", "describe", "direction_norm_", "grad_dots", "grad_norms", "is_current",
    "perturb_",
    "random_perturb_", "restore_", "sgd_step_", "vouch",
]  # fmt: skip
