"""``torch._foreach_*`` on any device, with no compiler: the fallback. Correct first; it makes temporaries and several passes.

Arithmetic in float32 (float64 for a row that has a float64 tensor), one rounding to storage, as every backend. Nothing here waits for a
device: a step is skipped by selecting, not by branching.
"""

from sam_kernels.backends.foreach.centralize import centralize_
from sam_kernels.backends.foreach.combinations import combine_, grad_dots
from sam_kernels.backends.foreach.directions import direction_norm_
from sam_kernels.backends.foreach.ops import (
    DEVICE_TYPES,
    DTYPES,
    IS_AUTOMATIC,
    KNOWS_SKIPS,
    REFUSES_NO_MEMORY,
    adamw_step_,
    check_finite_,
    current_grads,
    describe,
    grad_norms,
    is_current,
    perturb_,
    restore_,
    sgd_step_,
    vouch,
)
from sam_kernels.backends.foreach.random import random_perturb_

__all__ = [
    "DEVICE_TYPES", "DTYPES", "IS_AUTOMATIC", "KNOWS_SKIPS", "REFUSES_NO_MEMORY",
    "adamw_step_", "centralize_", "check_finite_",
    "combine_", "current_grads", "describe", "direction_norm_", "grad_dots", "grad_norms", "is_current", "perturb_",
    "random_perturb_", "restore_", "sgd_step_", "vouch",
]  # fmt: skip
