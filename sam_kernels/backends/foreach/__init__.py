"""``torch._foreach_*`` on any device, with no compiler: the fallback. Correct first; it makes temporaries and several passes.

Arithmetic in float32 (float64 for a row that has a float64 tensor), one rounding to storage, as every backend. Nothing here waits for a
device: a step is skipped by selecting, not by branching.
"""

from sam_kernels import operations
from sam_kernels._backend import Backend
from sam_kernels.backends.foreach import _lists, ops
from sam_kernels.backends.foreach.centralize import centralize_
from sam_kernels.backends.foreach.combinations import combine_, grad_dots
from sam_kernels.backends.foreach.directions import direction_norm_
from sam_kernels.backends.foreach.random import random_perturb_

__all__ = ["BACKEND"]

BACKEND = Backend(
    name="foreach",
    operations={
        operations.AdamWStep: ops.adamw_step_,
        operations.Centralize: centralize_,
        operations.CheckFinite: ops.check_finite_,
        operations.Combine: combine_,
        operations.DirectionNorm: direction_norm_,
        operations.GradDots: grad_dots,
        operations.GradNorms: ops.grad_norms,
        operations.Perturb: ops.perturb_,
        operations.RandomPerturb: random_perturb_,
        operations.Restore: ops.restore_,
        operations.SgdStep: ops.sgd_step_,
    },
    trust=_lists.trust,
    current_grads=_lists.current_grads,
    is_current=_lists.is_current,
    describe=_lists.describe,
    knows_skips=True,  # on the CPU
    refuses_no_memory=False,  # torch reads what it is given
)
