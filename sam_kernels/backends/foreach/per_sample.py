"""Gradient norms per sample with torch's own batched products: the fallback on any device, and what the kernels are compared with.

Temporaries are bounded: groups are taken some at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sam_kernels._tensor_list import arithmetic_dtype

__all__ = ["affine_grads_", "conv_square_norms_", "embedding_square_norms_", "linear_method", "linear_square_norms_"]

_TEMPORARY = 1 << 24  # elements: 64 MiB of float32

conv_square_norms_ = None  # unfolded by the caller, then a linear layer


def linear_method(tokens: int, in_features: int, out_features: int) -> str:
    """Batched products know no symmetry: 2 T^2 (d + p) flops against 2 T d p."""
    return "gram" if tokens * (in_features + out_features) <= in_features * out_features else "direct"


def linear_square_norms_(
    square_norms: Tensor,  # (M,) float64
    inputs: Tensor,  # (M, T, d)
    grad_outputs: Tensor,  # (M, T, p)
    products: Tensor | None,  # (M, p, d)
    *,
    bias: bool,
    method: str,
    precision: str,
) -> None:
    """Writes and reads the (T, T) or (p, d) products of some groups at a time. ``precision`` is torch's to decide."""
    m, tokens, in_features = inputs.shape
    out_features = grad_outputs.shape[2]
    dtype = arithmetic_dtype((inputs, grad_outputs))
    size = 2 * tokens * tokens if method == "gram" else out_features * in_features
    for part in _parts(m, size + tokens * (in_features + out_features)):
        a, g = inputs[part].to(dtype), grad_outputs[part].to(dtype)
        if method == "direct":
            product = torch.bmm(g.mT, a)
            if products is not None:
                products[part] = product
            terms = product.square_()
        elif tokens == 1:
            square_norms[part] += (a.square().sum((1, 2)).double() + bias) * g.square().sum((1, 2)).double()
            continue
        else:
            terms = torch.bmm(a, a.mT)
            terms = (terms.add_(1.0) if bias else terms).mul_(torch.bmm(g, g.mT))
        square_norms[part] += terms.sum((1, 2)).double()


def affine_grads_(
    weight_grads: Tensor | None,  # (M, C)
    bias_grads: Tensor | None,  # (M, C)
    normalized: Tensor | None,  # (M, S, C, L)
    grad_outputs: Tensor,  # (M, S, C, L)
) -> None:
    """Reads g, and x and g again."""
    for part in _parts(len(grad_outputs), grad_outputs[0].numel()):
        g = grad_outputs[part]
        if bias_grads is not None:
            bias_grads[part] = g.sum((1, 3), dtype=bias_grads.dtype)
        if weight_grads is not None and normalized is not None:
            weight_grads[part] = (normalized[part].to(weight_grads.dtype) * g).sum((1, 3))


def embedding_square_norms_(
    square_norms: Tensor,  # (M,) float64
    indices: Tensor,  # (M, T) int64
    grad_outputs: Tensor,  # (M, T, D)
    *,
    padding_idx: int | None,
) -> None:
    """Sums of the rows of each distinct index of a group, found by sorting; no host waits for their number."""
    dtype = arithmetic_dtype((grad_outputs,))
    tokens, dim = grad_outputs.shape[1:]
    for part in _parts(len(indices), tokens * dim):
        ids, order = indices[part].sort(dim=1)
        starts = torch.ones_like(ids)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        runs = starts.cumsum(1) - 1  # (m, T): which of the group's distinct indices
        g = grad_outputs[part].to(dtype).gather(1, order.unsqueeze(2).expand(-1, -1, dim))
        if padding_idx is not None:
            g = g.masked_fill((ids == padding_idx).unsqueeze(2), 0.0)
        sums = torch.zeros_like(g).scatter_add_(1, runs.unsqueeze(2).expand_as(g), g)
        square_norms[part] += sums.square_().sum((1, 2)).double()


def _parts(m: int, elements_each: int) -> Iterator[slice]:
    step = max(1, _TEMPORARY // max(1, elements_each))
    return (slice(start, min(m, start + step)) for start in range(0, m, step))
