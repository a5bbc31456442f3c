"""Inner products of every sample's gradient with one vector, from the forms of ``_terms.py``: no sample's gradient is formed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_kernels._tensor_list import arithmetic_dtype
from sam_kernels._validate import describe
from sam_kernels.per_sample._combine import Mixed, Tied
from sam_kernels.per_sample._terms import Convolution, Dense, Outer, Rows, Shift, Term

__all__ = ["dots_of", "vectors_of"]

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def vectors_of(vectors: object, model: nn.Module) -> dict[int, Tensor]:
    """By the ids of the parameters, what :meth:`GradNorms.dots` was given. Raises TypeError or ValueError."""
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if isinstance(vectors, Mapping):
        if unknown := [name for name in vectors if name not in params]:
            raise ValueError(f"GradNorms.dots: vectors has {unknown[0]!r}, which is no trainable parameter of the model")
        named = dict(vectors)
    elif isinstance(vectors, list | tuple):
        if len(vectors) != len(params):
            raise ValueError(f"GradNorms.dots: vectors has {len(vectors)} tensors for {len(params)} trainable parameters")
        named = dict(zip(params, vectors, strict=True))
    else:
        raise TypeError(f"GradNorms.dots: vectors must be a list of tensors, or a dict of them by names, got {describe(vectors)}")
    for name, vector in named.items():
        if not isinstance(vector, Tensor) or not vector.is_floating_point():
            raise TypeError(f"GradNorms.dots: the vector for {name!r} must be a floating-point tensor, got {describe(vector)}")
        if vector.shape != params[name].shape:
            shapes = tuple(vector.shape), tuple(params[name].shape)
            raise ValueError(f"GradNorms.dots: the vector for {name!r} has shape {shapes[0]}, its parameter {shapes[1]}")
    return {id(params[name]): vector.detach() for name, vector in named.items()}


def dots_of(term: Term, vector: Tensor, m: int) -> Tensor:  # (M,) float64
    """⟨g_i, v⟩ of each of ``m`` groups of samples, for ``vector`` v of the parameter's shape.

    Of a linear layer Σ_t left_t' V right_t: T p d multiplications a sample, as the layer's forward pass. Of a convolution the inner product
    of the output's gradient with the convolution of the input by V; of an embedding that of the rows that a sample reads.
    """
    if isinstance(term, Tied):
        return dots_of(term.rows, vector, m) + dots_of(term.outer, vector, m)
    if isinstance(term, Mixed):
        return torch.stack([dots_of(each, vector, m) for each in term.terms]).sum(0)
    if isinstance(term, Shift):
        return _grouped(term.left.sum(1, dtype=arithmetic_dtype((term.left,))), vector.reshape(1, -1), m)
    if isinstance(term, Dense):
        return _grouped(term.grads.reshape(len(term.grads), -1), vector.reshape(1, -1), m)
    if isinstance(term, Outer | Convolution) and term.products is not None:
        return _grouped(term.products.flatten(1), vector.reshape(1, -1), m)
    if isinstance(term, Outer):
        return _of_outer(term, vector, m)
    if isinstance(term, Convolution):
        return _of_convolution(term, vector, m)
    if isinstance(term, Rows):
        rows = vector[term.indices]
        if term.padding_idx is not None:
            rows = rows.masked_fill((term.indices == term.padding_idx).unsqueeze(2), 0.0)
        return _grouped(term.values, rows, m)
    raise TypeError(f"GradNorms.dots: {type(term).__name__} has no inner products")


def _of_outer(term: Outer, vector: Tensor, m: int) -> Tensor:
    left, right = term.left, term.right
    dtype = arithmetic_dtype((left, right, vector))
    matrix = vector.reshape(left.shape[2], right.shape[2]).to(dtype)
    if left.shape[2] < right.shape[2]:  # the smaller one is what is made
        return _grouped(right.to(dtype) @ matrix.mT, left, m)
    return _grouped(left.to(dtype) @ matrix, right, m)


def _of_convolution(term: Convolution, vector: Tensor, m: int) -> Tensor:
    x, g = term.inputs, term.grad_outputs
    dtype = arithmetic_dtype((x, g, vector))
    kernel = vector.reshape(g.shape[1], x.shape[1] // term.groups, *term.kernel_size).to(dtype)
    convolve: Any = _CONVOLUTIONS[len(term.kernel_size)]
    made = convolve(x.to(dtype), kernel, None, term.stride, term.padding, term.dilation, term.groups)
    for dim, size in enumerate(g.shape[2:], 2):
        made = made.narrow(dim, 0, size)
    return _grouped(made, g, m)


def _grouped(left: Tensor, right: Tensor, m: int) -> Tensor:  # (rows, ...) twice, or (1, ...) -> (M,) float64
    """Sums of products, of consecutive rows together."""
    products = left.to(torch.float64).mul_(right) if left.dtype is not torch.float64 else left * right
    return products.reshape(m, -1).sum(1)
