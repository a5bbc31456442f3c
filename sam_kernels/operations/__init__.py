"""The operations over lists of tensors as values. ``sam_kernels.functional`` checks options and makes them; a backend takes one and its
lists. A new option is a field here, a new operation a class in :data:`OPERATIONS`."""

from sam_kernels.operations._operation import Access, Limits, Number, Operands, Operation, number_on
from sam_kernels.operations.ascent import Perturb, RandomPerturb, Restore
from sam_kernels.operations.descent import AdamWStep, Descent, SgdStep
from sam_kernels.operations.family import Centralize, Combine, DirectionNorm, GradDots
from sam_kernels.operations.norms import Adaptive, CheckFinite, GradNorms

__all__ = [
    "OPERATIONS", "Access", "AdamWStep", "Adaptive", "Centralize", "CheckFinite", "Combine", "Descent", "DirectionNorm", "GradDots",
    "GradNorms", "Limits", "Number", "Operands", "Operation", "Perturb", "RandomPerturb", "Restore", "SgdStep", "number_on",
]  # fmt: skip

OPERATIONS: tuple[type[Operation], ...] = (
    AdamWStep, Centralize, CheckFinite, Combine, DirectionNorm, GradDots, GradNorms, Perturb, RandomPerturb, Restore, SgdStep,
)  # fmt: skip
