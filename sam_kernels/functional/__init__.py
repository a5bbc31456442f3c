"""The operations, over lists of tensors: each docstring is the contract that every backend keeps and ``sam_kernels.reference`` specifies.

Lists hold one tensor per parameter; ``N`` is their total number of elements, ``s`` bytes each. dtypes are float32, float64, bfloat16 and
float16, mixed freely between lists and rows. Arithmetic is float32 (float64 for a row that has a float64 tensor) with one rounding to
storage. Tensors may be non-contiguous, unaligned or empty. A trailing ``_`` means in place: data pointers never change.

Numbers that change from step to step, ``rho``, ``lambd``, ``lr``, ``scale`` and the weights of ``combine_``, may be given as tensors of
one floating-point element, on the CPU or on the device of the tensors beside them. On a device they are read where they are used and
nobody waits for them, so that a CUDA graph follows them; their range is then not checked.

Tensors have memory of their own, subclasses included (``Parameter``, ``Buffer``). FakeTensors, and calls while a ``FakeTensorMode`` is
active, give fake results of the right dtype, shape and device, and no kernel runs. DTensors and other wrappers, tensors inside a
transform of ``torch.func``, meta tensors and tensors whose storage was freed are refused with ``TypeError``. Scalar tensors (``norm``,
``grad_scale``, ``found_inf``) are of any floating dtype; ``skipped`` and ``state_steps``, which count, of float32 or float64.

Errors, common to all: ``TypeError`` for a wrong type, layout (sparse) or dtype (complex, integer), ``ValueError`` for lists whose lengths,
shapes or devices do not fit, for a tensor written twice, and for a number out of range. They name the operation, the list and the index,
and are raised before any memory is touched.
"""

from sam_kernels.functional import per_sample as per_sample  # functional.per_sample without an import of its own; no operation
from sam_kernels.functional._results import combine_norms
from sam_kernels.functional.ascent import perturb_, restore_
from sam_kernels.functional.centralize import centralize_
from sam_kernels.functional.combinations import combine_, grad_dots
from sam_kernels.functional.descent import adamw_step_, sgd_step_
from sam_kernels.functional.directions import direction_norm_
from sam_kernels.functional.norms import check_finite_, grad_norm, grad_norm_, grad_norms
from sam_kernels.functional.random import random_perturb_
from sam_kernels.functional.sharpness import sharpness_sample, sharpness_weights

__all__ = [
    "adamw_step_", "centralize_", "check_finite_", "combine_", "combine_norms", "direction_norm_", "grad_dots", "grad_norm", "grad_norm_",
    "grad_norms", "perturb_", "random_perturb_", "restore_", "sgd_step_", "sharpness_sample", "sharpness_weights",
]  # fmt: skip
