"""Gradients less their means over all dimensions but the first."""

from __future__ import annotations

import torch
from torch import Tensor

from sam_kernels._flags import report_norm
from sam_kernels._tensor_list import arithmetic_dtype, slice_sizes
from sam_kernels.backends.foreach._rows import arithmetic_dtypes, joined_norm, norms_of, widen, write
from sam_kernels.operations import Centralize, Operands

__all__ = ["centralize_"]


def centralize_(op: Centralize, lists: Operands) -> Tensor:  # () float32, float64 where a gradient is float64
    """See :class:`sam_kernels.operations.Centralize`."""
    grads = lists["grads"]
    directions = widen(grads, arithmetic_dtypes(op, lists))
    for i, size in enumerate(slice_sizes(grads)):
        if size > 0:
            g = directions[i]
            directions[i] = g - g.mean(dim=tuple(range(1, g.dim())), keepdim=True, dtype=torch.float64).to(g.dtype)
            write([grads[i]], [directions[i]], None)
    return report_norm(joined_norm(norms_of(op, directions, lists)).to(arithmetic_dtype(grads)), op.found_inf)
