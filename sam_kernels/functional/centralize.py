"""Gradients centralised in place."""

from __future__ import annotations

import torch
from torch import Tensor

from sam_kernels import _validate
from sam_kernels._flags import report_norm
from sam_kernels._grouping import split
from sam_kernels.functional._common import Tensors, check_lists
from sam_kernels.functional._library import operation
from sam_kernels.functional.norms import combine_norms, fake_norm
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
    name = Centralize.name
    _validate.check_flag(name, "adaptive", adaptive)
    eta = _validate.check_number(name, "eta", eta, low=0.0)
    if adaptive and params is None:
        raise ValueError(f"{name}: adaptive=True needs params")
    if found_inf is not None:
        _validate.check_scalar_tensor(name, "found_inf", found_inf)
    lists: dict[str, Tensors | None] = {"grads": grads, "params": params if adaptive else None}
    check_lists(Centralize, lists)
    row_groups = split(lists, written=Centralize.written, by_slices=True)
    # One backend reports by itself, on a device within the launch that finishes the norm.
    alone = len(row_groups) == 1 and (found_inf is None or found_inf.device == grads[0].device)
    op = Centralize(adaptive=adaptive, eta=eta, found_inf=found_inf if alone else None)
    norms = [rows.run(op) for rows in row_groups]
    result = combine_norms(norms) if norms else torch.zeros((), dtype=torch.float32, device="cpu")
    return result if alone else report_norm(result, found_inf, None, None)
