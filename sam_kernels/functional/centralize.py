"""Gradients centralised in place."""

from __future__ import annotations

from torch import Tensor

from sam_kernels._grouping import split
from sam_kernels.functional._common import Tensors, check_lists, checked, params_if
from sam_kernels.functional._library import operation
from sam_kernels.functional._results import joined, run_reporting
from sam_kernels.functional.norms import fake_norm
from sam_kernels.operations import Centralize

__all__ = ["centralize_"]


@operation(written=(*Centralize.written, *Centralize.reports), fake=fake_norm)
def centralize_(
    grads: Tensors,  # n tensors
    params: Tensors | None = None,  # n tensors
    *,
    adaptive: bool = False,
    eta: float = 0.0,
    found_inf: Tensor | None = None,  # () float32
) -> Tensor:  # () float32, float64 where a gradient is float64
    """Subtracts from each gradient its mean over all dimensions but the first, and returns the norm of what is left.

    Gradient Centralization (arXiv 2004.01461), for GCSAM: sqrt(sum g^2) of the centralised g, or of T_w g with T_w = |p| + eta when
    ``adaptive`` (ASAM). A gradient of fewer than two dimensions keeps its bits, and is in the norm.
    A mean is that of one slice along the first dimension, one output channel. It is summed in float64, in float32 in the Triton kernels
    (where its sum overflows above 3.4e38), in a fixed order, and rounded to the arithmetic type before it is subtracted. The norm is that
    of the differences before they are rounded to storage, summed as in :func:`grad_norm`.
    What is not finite makes its whole slice so. ``found_inf`` is set to 1 where the norm is not finite, and left alone otherwise.
    Reads g (and p), writes g: 2 N s bytes. A slice of more than 2^16 elements is read twice from memory, and by one thread or one block.
    """
    op = checked(Centralize(adaptive=adaptive, eta=eta, found_inf=found_inf))
    lists: dict[str, Tensors | None] = {"grads": grads, "params": params_if(op.adaptive, op.name, params)}
    check_lists(Centralize, lists)
    return run_reporting(op, split(lists, written=op.written, by_slices=True), joined)
