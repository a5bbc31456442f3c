"""Per-sample gradients towards one input of a node of autograd's graph, from what the node has saved and the gradient of its output.

Each rule is given the node, the number of the input, the input's shape, and the output's gradient with the batch in dimension 0. It returns
(B, *shape), or a form of ``_terms.py``. The names are those of the operation that the forward pass has called, whichever module called it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sam_kernels._tensor_list import arithmetic_dtype
from sam_kernels.per_sample._terms import Convolution, Outer, Rows, affine_grads

__all__ = ["BATCH_NORMS", "ELEMENTWISE", "NODE_RULES", "NodeRule", "is_entered", "merged"]

Found = Tensor | Outer | Convolution | Rows
NodeRule = Callable[[Any, int, torch.Size, Tensor], Found]


def is_entered(node: Any, index: int, shape: torch.Size, batch: int) -> bool:
    """Whether a value of ``shape`` without a batch meets the batch in ``node``: dimension 0 of its output is that of the batch, or of the
    batch and what was merged into it (positions, windows)."""
    output: torch.Size = node._input_metadata[0].shape
    name = type(node).__name__
    if name not in NODE_RULES or not output or output[0] % batch != 0:
        return False
    if name in ELEMENTWISE:  # broadcast over the batch
        return len(shape) < len(output) or (len(shape) == len(output) and shape[0] == 1)
    return index in _WEIGHTS.get(name, (1, 2))


def merged(found: Found, batch: int) -> Found:
    """What was found for each row of dimension 0, of ``batch`` samples with as many rows each."""
    if isinstance(found, Convolution):
        return found if len(found.inputs) == batch else merged(found.sample_grads(slice(None), torch.Size(found.sizes()[1:])), batch)
    if isinstance(found, Outer):
        return Outer(*(each.reshape(batch, -1, each.shape[2]) for each in (found.left, found.right)))
    if isinstance(found, Rows):
        return Rows(found.indices.reshape(batch, -1), found.values.reshape(batch, -1, found.values.shape[2]), found.padding_idx)
    if len(found) == batch:
        return found
    return found.reshape(batch, -1, *found.shape[1:]).sum(1, dtype=arithmetic_dtype((found,)))


def _summed(grads: Tensor, shape: torch.Size) -> Tensor:  # (B, ...) -> (B, *shape)
    """Sums over the dimensions in which a value of ``shape`` was broadcast; dimension 0 is the batch's."""
    inner = shape[1:] if len(shape) == grads.dim() else shape
    missing = grads.dim() - 1 - len(inner)
    dims = [1 + i for i in range(missing)]
    dims += [1 + missing + i for i, size in enumerate(inner) if size == 1 and grads.shape[1 + missing + i] != 1]
    if dims:
        grads = grads.sum(dims, dtype=arithmetic_dtype((grads,)))
    return grads.reshape(len(grads), *shape)


def _multiplied(grads: Tensor, other: Tensor, shape: torch.Size) -> Tensor:
    """The sum of products; of a value that lies along the last dimension, or along dimension 1, by the kernel of scales."""
    if other.shape == grads.shape and shape:
        sizes = [size for size in shape if size != 1]
        if len(sizes) == 1 and shape[-1] == sizes[0] == grads.shape[-1]:
            planes = (each.reshape(len(grads), -1, sizes[0], 1) for each in (grads, other))
            return affine_grads(*planes)[0].view(len(grads), *shape)
        inner = shape[1:] if len(shape) == grads.dim() else shape
        if len(sizes) == 1 and len(inner) == grads.dim() - 1 and inner[0] == sizes[0] == grads.shape[1]:
            planes = (each.reshape(len(grads), 1, sizes[0], -1) for each in (grads, other))
            return affine_grads(*planes)[0].view(len(grads), *shape)
    return _summed(grads * other, shape)


def _other(node: Any, index: int) -> Any:
    return node._saved_other if index == 0 else node._saved_self


def _add(node: Any, index: int, shape: torch.Size, grad: Tensor) -> Tensor:
    return _summed(grad if index == 0 else grad * node._saved_alpha, shape)


def _sub(node: Any, index: int, shape: torch.Size, grad: Tensor) -> Tensor:
    return _summed(grad if index == 0 else grad * -node._saved_alpha, shape)


def _mul(node: Any, index: int, shape: torch.Size, grad: Tensor) -> Tensor:
    return _multiplied(grad, _other(node, index), shape)


def _div(node: Any, index: int, shape: torch.Size, grad: Tensor) -> Tensor:
    other = node._saved_other
    return _multiplied(grad, other.reciprocal() if index == 0 else -node._saved_self / other.square(), shape)


def _expand(node: Any, index: int, shape: torch.Size, grad: Tensor) -> Tensor:
    return _summed(grad, shape)


def _repeat(node: Any, index: int, shape: torch.Size, grad: Tensor) -> Tensor:
    """Repeats beside those over the batch are further rows of dimension 0, or positions, of the gradient."""
    inner = (1,) * (grad.dim() - len(shape)) + tuple(shape)
    tiles = [size for n, each in zip(grad.shape[1:], inner[1:], strict=True) for size in (n // each, each)]
    return grad.reshape(len(grad), *tiles).sum(list(range(1, 2 * grad.dim() - 2, 2))).reshape(len(grad), *shape)


def _product(node: Any, index: int, shape: torch.Size, grad: Tensor) -> Found:
    """x W: grad (rows, p)."""
    is_addmm = type(node).__name__ == "AddmmBackward0"
    if is_addmm and index == 0:
        return _summed(grad if node._saved_beta == 1 else grad * node._saved_beta, shape)
    x = node._saved_mat1 if is_addmm else node._saved_self
    if is_addmm and node._saved_alpha != 1:
        grad = grad * node._saved_alpha
    return Outer(x.unsqueeze(1), grad.unsqueeze(1))


def _convolution(node: Any, index: int, shape: torch.Size, grad: Tensor) -> Found:
    if index == 2:
        return affine_grads(grad.reshape(len(grad), 1, grad.shape[1], -1))[1]
    x, g = node._saved_input, grad
    if node._saved_transposed:
        if any(node._saved_output_padding):
            raise NotImplementedError("a transposed convolution with output_padding")
        x, g = g, x
    stride, padding, dilation = (tuple(getattr(node, f"_saved_{name}")) for name in ("stride", "padding", "dilation"))
    return Convolution(x, g, tuple(shape[2:]), stride, padding, dilation, node._saved_groups)


def _embedding(node: Any, index: int, shape: torch.Size, grad: Tensor) -> Found:
    if node._saved_scale_grad_by_freq:
        raise NotImplementedError("scale_grad_by_freq divides by counts over the whole batch: no sample has a gradient of its own")
    indices, padding = node._saved_indices, node._saved_padding_idx
    values = grad.reshape(len(grad), -1, grad.shape[-1])
    if grad.dim() > indices.dim() + 1:  # the same rows for all samples
        indices = indices.expand(len(grad), *indices.shape)
    return Rows(indices.reshape(len(grad), -1), values, padding if 0 <= padding < 2**62 else None)


def _layer_norm(node: Any, index: int, shape: torch.Size, grad: Tensor) -> Tensor:
    size = shape.numel()
    grad = grad.reshape(len(grad), -1, size, 1)
    if index == 2:
        return affine_grads(grad)[1].view(-1, *shape)
    x, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
    normalized = ((x.to(mean.dtype) - mean) * rstd).reshape(grad.shape)
    return affine_grads(grad, normalized)[0].view(-1, *shape)


def _rms_norm(node: Any, index: int, shape: torch.Size, grad: Tensor) -> Tensor:
    x, rstd = node._saved_input, node._saved_result1
    grad = grad.reshape(len(grad), -1, shape.numel(), 1)
    return affine_grads(grad, (x.to(rstd.dtype) * rstd).reshape(grad.shape))[0].view(-1, *shape)


def _group_norm(node: Any, index: int, shape: torch.Size, grad: Tensor) -> Tensor:
    planes = grad.reshape(len(grad), 1, shape[0], -1)
    if index == 2:
        return affine_grads(planes)[1]
    x, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2  # (B, groups)
    grouped = x.to(mean.dtype).reshape(*mean.shape, -1)
    normalized = ((grouped - mean.unsqueeze(2)) * rstd.unsqueeze(2)).reshape(planes.shape)
    return affine_grads(planes, normalized)[0]


def _batch_norm(node: Any, index: int, shape: torch.Size, grad: Tensor) -> Tensor:
    """In training each sample's part of the sum that is the batch's gradient."""
    planes = grad.reshape(len(grad), 1, shape[0], -1)
    if index == 2:
        return affine_grads(planes)[1]
    x = node._saved_input
    if node._saved_training:
        mean, rstd = node._saved_result1, node._saved_result2
    else:
        mean, rstd = node._saved_running_mean, torch.rsqrt(node._saved_running_var + node._saved_eps)
    normalized = (x.to(mean.dtype).reshape(planes.shape) - mean.view(-1, 1)) * rstd.view(-1, 1)
    return affine_grads(planes, normalized)[0]


ELEMENTWISE = frozenset(("AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0", "ExpandBackward0", "RepeatBackward0"))
BATCH_NORMS = frozenset(("NativeBatchNormBackward0", "CudnnBatchNormBackward0"))
# Inputs that are weights of an operation, 1 and 2 unless they stand here: a value in another place, normalised positions say, is no weight.
_WEIGHTS = {"MmBackward0": (1,), "AddmmBackward0": (0, 2), "EmbeddingBackward0": (0,), "FusedRmsNormBackward0": (1,)}
NODE_RULES: dict[str, NodeRule] = {
    "AddBackward0": _add,
    "SubBackward0": _sub,
    "MulBackward0": _mul,
    "DivBackward0": _div,
    "ExpandBackward0": _expand,
    "RepeatBackward0": _repeat,
    "MmBackward0": _product,
    "AddmmBackward0": _product,
    "ConvolutionBackward0": _convolution,
    "EmbeddingBackward0": _embedding,
    "NativeLayerNormBackward0": _layer_norm,
    "FusedRmsNormBackward0": _rms_norm,
    "NativeGroupNormBackward0": _group_norm,
    "NativeBatchNormBackward0": _batch_norm,
    "CudnnBatchNormBackward0": _batch_norm,
}
