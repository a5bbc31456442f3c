"""What normalisation layers and biases have in common: a scale and a shift."""

from __future__ import annotations

from torch import Tensor

from sam_kernels._tensor_list import arithmetic_dtype
from sam_kernels.functional._library import operation
from sam_kernels.functional.per_sample._checks import backend_for, check_on, check_output, check_shape

__all__ = ["affine_grads_"]


@operation(written=("weight_grads", "bias_grads"))
def affine_grads_(
    weight_grads: Tensor | None,  # (M, C) float32, float64 where an operand is float64
    bias_grads: Tensor | None,  # (M, C) alike
    normalized: Tensor | None,  # (M, S, C, L)
    grad_outputs: Tensor,  # (M, S, C, L)
) -> None:
    """Each group's gradients of y = weight x + bias, x being the ``normalized`` values: the sums over S and L of x g, and of g.

    Channels in the middle: LayerNorm and the bias of a linear layer have L = 1 and S positions; BatchNorm, GroupNorm, InstanceNorm and the
    bias of a convolution have L positions and S samples. What is not None is written; both in one pass. Reads x and g: 2 M S C L s bytes.
    """
    op = "affine_grads_"
    check_shape(op, "grad_outputs", grad_outputs, 4, "(groups, S, channels, L)")
    if (weight_grads is None) != (normalized is None):
        raise ValueError(f"{op}: weight_grads and normalized must be given together")
    if normalized is not None:
        check_shape(op, "normalized", normalized, 4, "(groups, S, channels, L)")
        if normalized.shape != grad_outputs.shape:
            raise ValueError(f"{op}: normalized has shape {tuple(normalized.shape)}, grad_outputs {tuple(grad_outputs.shape)}")
    shape = (grad_outputs.shape[0], grad_outputs.shape[2])
    written = {"weight_grads": weight_grads, "bias_grads": bias_grads}
    for name, tensor in written.items():
        if tensor is not None:
            check_output(op, name, tensor, shape, arithmetic_dtype((normalized, grad_outputs)))
    check_on(op, grad_outputs.device, {**written, "normalized": normalized})
    if grad_outputs.numel() == 0:
        for tensor in written.values():
            if tensor is not None:
                tensor.zero_()
        return
    values = None if normalized is None else normalized.contiguous()
    backend_for(grad_outputs, normalized).affine_grads_(weight_grads, bias_grads, values, grad_outputs.contiguous())
