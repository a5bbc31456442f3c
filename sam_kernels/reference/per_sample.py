"""Gradients of single groups of samples, formed one after the other: what :mod:`sam_kernels.functional.per_sample` never forms.

A group is a sample or a micro-batch of consecutive samples. ``grad_outputs`` is the gradient of the sum of all samples' losses towards a
layer's output. Formulas: Goodfellow, arXiv 1510.01799; Rochette, Manoel, Tramel, arXiv 1912.06015 (convolutions).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

__all__ = [
    "affine_grads_",
    "conv_sample_grads",
    "conv_square_norms_",
    "embedding_sample_grads",
    "embedding_square_norms_",
    "linear_sample_grads",
    "linear_square_norms_",
]

_CONV_WEIGHT: dict[int, Any] = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


def linear_sample_grads(inputs: Tensor, grad_outputs: Tensor) -> Tensor:  # (M, T, d), (M, T, p) -> (M, p, d)
    """sum over t of g_t a_t', for every group."""
    return torch.stack([g.mT @ a for a, g in zip(inputs, grad_outputs, strict=True)])


def conv_sample_grads(
    inputs: Tensor,  # (B, C, *positions)
    grad_outputs: Tensor,  # (B, p, *positions of the output)
    groups_of_samples: int,  # M, of B / M consecutive samples each
    *,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int = 1,
) -> Tensor:  # (M, p, C / groups, *kernel_size)
    """The gradient of a convolution's weight, for every group of samples."""
    shape = (grad_outputs.shape[1], inputs.shape[1] // groups, *kernel_size)
    weight_grad = _CONV_WEIGHT[len(kernel_size)]
    pairs = zip(inputs.chunk(groups_of_samples), grad_outputs.chunk(groups_of_samples), strict=True)
    return torch.stack([weight_grad(a, shape, g, stride, padding, dilation, groups) for a, g in pairs])


def embedding_sample_grads(
    indices: Tensor,  # (M, T)
    grad_outputs: Tensor,  # (M, T, D)
    num_embeddings: int,
    padding_idx: int | None = None,
) -> Tensor:  # (M, num_embeddings, D)
    """Row i collects the g_t of every t with index i; the padding's row stays zero."""
    grads = grad_outputs.new_zeros(len(indices), num_embeddings, grad_outputs.shape[-1])
    for group, ids, g in zip(grads, indices, grad_outputs, strict=True):
        for i, row in zip(ids.tolist(), g, strict=True):
            if i != padding_idx:
                group[i] += row
    return grads


def linear_square_norms_(
    square_norms: Tensor,  # (M,)
    inputs: Tensor,
    grad_outputs: Tensor,
    products: Tensor | None = None,  # (M, p, d)
    *,
    bias: bool = False,
    **_: str,
) -> None:
    """Adds |grad|^2 of every group, of the bias too. How a kernel goes about it (``method``, ``precision``) changes no number here."""
    _add(square_norms, linear_sample_grads(inputs, grad_outputs), products)
    if bias:
        _add(square_norms, grad_outputs.sum(1), None)


def conv_square_norms_(
    square_norms: Tensor,  # (M,)
    inputs: Tensor,
    grad_outputs: Tensor,
    products: Tensor | None = None,  # (M, p, C / groups, *kernel_size)
    *,
    method: str = "auto",
    precision: str = "ieee",
    **convolution: Any,
) -> None:
    """Adds |grad|^2 of every group."""
    _add(square_norms, conv_sample_grads(inputs, grad_outputs, len(square_norms), **convolution), products)


def embedding_square_norms_(
    square_norms: Tensor,  # (M,)
    indices: Tensor,
    grad_outputs: Tensor,
    *,
    padding_idx: int | None = None,
) -> None:
    """Adds |grad|^2 of every group."""
    count = int(indices.max()) + 1 if indices.numel() else 0
    _add(square_norms, embedding_sample_grads(indices, grad_outputs, count, padding_idx), None)


def affine_grads_(
    weight_grads: Tensor | None,  # (M, C)
    bias_grads: Tensor | None,  # (M, C)
    normalized: Tensor | None,  # (M, S, C, L)
    grad_outputs: Tensor,  # (M, S, C, L)
) -> None:
    """Gradients of y = weight x + bias, with x the ``normalized`` values: sums over S and L of x g, and of g."""
    if weight_grads is not None and normalized is not None:
        weight_grads.copy_((normalized * grad_outputs).sum((1, 3)))
    if bias_grads is not None:
        bias_grads.copy_(grad_outputs.sum((1, 3)))


def _add(square_norms: Tensor, grads: Tensor, products: Tensor | None) -> None:
    square_norms += grads.flatten(1).square().sum(1)
    if products is not None:
        products.copy_(grads)
