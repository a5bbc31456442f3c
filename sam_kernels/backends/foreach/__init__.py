"""``torch._foreach_*`` on any device, with no compiler: the fallback. Correct first; it makes temporaries and several passes.

Arithmetic in float32 (float64 for a row that has a float64 tensor), one rounding to storage, as every backend. Nothing here waits for a
device: a step is skipped by selecting, not by branching.
"""

from sam_kernels._backend import Backend, implementations
from sam_kernels.backends.foreach import _lists
from sam_kernels.backends.foreach.centralize import centralize_
from sam_kernels.backends.foreach.combinations import combine_, grad_dots
from sam_kernels.backends.foreach.directions import direction_norm_
from sam_kernels.backends.foreach.ops import adamw_step_, check_finite_, grad_norms, perturb_, restore_, sgd_step_
from sam_kernels.backends.foreach.random import random_perturb_

__all__ = [
    "BACKEND", "adamw_step_", "centralize_", "check_finite_", "combine_", "direction_norm_", "grad_dots", "grad_norms", "perturb_",
    "random_perturb_", "restore_", "sgd_step_",
]  # fmt: skip

BACKEND = Backend(
    name="foreach",
    operations=implementations(globals()),
    trust=_lists.trust,
    current_grads=_lists.current_grads,
    is_current=_lists.is_current,
    current_local_grads=_lists.current_local_grads,
    are_locals_of=_lists.are_locals_of,
    describe=_lists.describe,
    knows_skips=True,  # on the CPU
    refuses_no_memory=False,  # torch reads what it is given
)
