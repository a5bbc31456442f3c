"""Gradient norms per sample with the CPU kernels of ``csrc/cpu``: blocks of products that are summed and dropped.

Nothing of the size of a gradient or of tokens x tokens is allocated: each thread keeps one or two MiB of blocks. Products and sums of a
block are in float32 with fused multiply-adds (float64 where a tensor is float64), what is added up of them in float64, in an order that
sizes alone decide: bits depend neither on the run nor on the number of threads, but do on the instruction set (how wide a vector is, and
whether a product is rounded before it is added).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sam_kernels.backends.native._cpu_lists import _cpu, _lists
from sam_kernels.backends.native._lists import written

__all__ = ["affine_grads_", "conv_square_norms_", "embedding_square_norms_", "linear_method", "linear_square_norms_"]

# Where the two forms take the same time, as a share of the T at which their flops are the same. By hand, AVX-512, one thread, float32:
# (d, p) = (64, 576) 0.65, (384, 384) 0.75, (384, 1536) 0.75, (1024, 1024) 0.95, (64, 64) 0.5. Tiles on the diagonal are computed whole,
# and rows are transposed before they are multiplied: both weigh the more the fewer tokens there are.
_GRAM_SPEED = 0.7


def linear_method(tokens: int, in_features: int, out_features: int) -> str:
    """The Gram form knows the symmetry: T^2 (d + p) flops against 2 T d p, at ``_GRAM_SPEED`` of the direct form's."""
    return "gram" if tokens * (in_features + out_features) <= _GRAM_SPEED * 2 * in_features * out_features else "direct"


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
    """Reads A and G: some times from the caches, once from memory where a group fits them. ``precision`` is always IEEE's."""
    m, tokens, in_features = inputs.shape
    tensors = _tensors(square_norms, inputs, grad_outputs, products)
    _cpu.linear_square_norms(tensors, m, tokens, in_features, grad_outputs.shape[2], method == "gram", bias, torch.get_num_threads())


def conv_square_norms_(
    square_norms: Tensor,  # (M,) float64
    inputs: Tensor,  # (B, C, *positions)
    grad_outputs: Tensor,  # (B, p, *positions of the output)
    products: Tensor | None,  # (M, p, C / groups, *kernel_size)
    *,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    method: str,
    precision: str,
) -> None:
    """Unfolds a tile of patches at a time, into the panels of a product. ``precision`` is always IEEE's."""
    m, samples, missing = square_norms.numel(), inputs.shape[0], 5 - inputs.dim()
    ones, zeros = (1,) * missing, (0,) * missing
    _cpu.conv_square_norms(
        _tensors(square_norms, inputs, grad_outputs, products),
        m,
        samples // m,
        inputs.shape[1],
        grad_outputs.shape[1],
        groups,
        (*ones, *inputs.shape[2:]),
        ones + kernel_size,
        ones + stride,
        zeros + padding,
        ones + dilation,
        method == "gram",
        torch.get_num_threads(),
    )


def affine_grads_(
    weight_grads: Tensor | None,  # (M, C)
    bias_grads: Tensor | None,  # (M, C)
    normalized: Tensor | None,  # (M, S, C, L)
    grad_outputs: Tensor,  # (M, S, C, L)
) -> None:
    """Reads x and g once: 2 N s bytes. Sums in float64."""
    outputs = [tensor for tensor in (weight_grads, bias_grads) if tensor is not None]
    written(outputs)
    tensors = _lists.describe([tensor for tensor in (weight_grads, normalized, bias_grads, grad_outputs) if tensor is not None])
    _cpu.affine_grads(tensors, weight_grads is not None, bias_grads is not None, *grad_outputs.shape, torch.get_num_threads())


def embedding_square_norms_(
    square_norms: Tensor,  # (M,) float64
    indices: Tensor,  # (M, T) int64
    grad_outputs: Tensor,  # (M, T, D)
    *,
    padding_idx: int | None,
) -> None:
    """Sorts each group's tokens by index and adds up rows of one index, in float64. Reads g once, but for rows cut at 256 elements."""
    written([square_norms])
    tensors = _lists.describe([square_norms, grad_outputs, indices.view(torch.float64)])
    _cpu.embedding_square_norms(tensors, *grad_outputs.shape, padding_idx, torch.get_num_threads())


def _tensors(square_norms: Tensor, inputs: Tensor, grad_outputs: Tensor, products: Tensor | None) -> object:
    if products is None:
        written([square_norms])
        return _lists.describe([square_norms, inputs, grad_outputs])
    written([square_norms, products])
    return _lists.describe([square_norms, inputs, grad_outputs, products])
