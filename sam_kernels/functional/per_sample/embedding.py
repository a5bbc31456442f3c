"""Embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from sam_kernels._validate import check_memory, describe
from sam_kernels.functional._library import operation
from sam_kernels.functional.per_sample._checks import backend_for, check_on, check_output, check_shape

__all__ = ["embedding_square_norms_"]


@operation(written=("square_norms",))
def embedding_square_norms_(
    square_norms: Tensor,  # (M,) float64
    indices: Tensor,  # (M, T) int64 or int32
    grad_outputs: Tensor,  # (M, T, D)
    *,
    padding_idx: int | None = None,
) -> None:
    """Adds the squared norm of each group's gradient of an embedding: the sum over s, t with the same index of <g_s, g_t>.

    Positions that hold ``padding_idx`` do not count. Reads g once, where no index comes up twice: M T D s bytes, and the indices.
    """
    op = "embedding_square_norms_"
    check_shape(op, "grad_outputs", grad_outputs, 3, "(groups, tokens, embedding_dim)")
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: indices must be an int64 or int32 tensor, got {describe(indices)}")
    check_memory(op, "indices", indices)
    if indices.shape != grad_outputs.shape[:2]:
        raise ValueError(
            f"{op}: indices has shape {tuple(indices.shape)}, grad_outputs {tuple(grad_outputs.shape)}: groups and tokens differ"
        )
    check_output(op, "square_norms", square_norms, (grad_outputs.shape[0],), torch.float64)
    check_on(op, grad_outputs.device, {"square_norms": square_norms, "indices": indices})
    if grad_outputs.numel():
        backend = backend_for(grad_outputs)
        backend.embedding_square_norms_(square_norms, indices.contiguous().long(), grad_outputs.contiguous(), padding_idx=padding_idx)
