"""C++ kernels for CPU tensors. Raises ImportError with the reason when the compiled module is missing.

Every function takes lists that :mod:`sam_kernels._grouping` made: checked, dense, on the CPU. Bytes are those of docs/architecture.md.
"""

from sam_kernels.backends.native.cpu import (
    DEVICE_TYPES,
    DTYPES,
    IS_AUTOMATIC,
    KNOWS_SKIPS,
    adamw_step_,
    check_finite_,
    current_grads,
    describe,
    direction_norm_,
    grad_norms,
    is_current,
    norm_roundings,
    perturb_,
    random_perturb_,
    restore_,
    sgd_step_,
    vouch,
)

__all__ = [
    "DEVICE_TYPES", "DTYPES", "IS_AUTOMATIC", "KNOWS_SKIPS", "adamw_step_", "check_finite_", "current_grads", "describe",
    "direction_norm_", "grad_norms", "is_current", "norm_roundings", "perturb_", "random_perturb_", "restore_", "sgd_step_",
    "vouch",
]  # fmt: skip
