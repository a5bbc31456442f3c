"""Convolutions in one, two and three dimensions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sam_kernels._tensor_list import arithmetic_dtype
from sam_kernels._unfold import output_sizes, unfolded
from sam_kernels.functional._library import operation
from sam_kernels.functional.per_sample._checks import backend_for, check_how, check_on, check_output, check_shape

__all__ = ["conv_square_norms_"]

_UNFOLDED_BYTES = 1 << 26  # at most so much at a time is unfolded, or one group's


@operation(written=("square_norms", "products"))
def conv_square_norms_(
    square_norms: Tensor,  # (M,) float64
    inputs: Tensor,  # (B, C, *positions)
    grad_outputs: Tensor,  # (B, p, *positions of the output)
    products: Tensor | None = None,  # (M, p, C / groups, *kernel_size) float32, float64 where an operand is float64
    *,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int = 1,
    method: str = "auto",
    precision: str = "ieee",
) -> None:
    """Adds the squared norm of each group of samples' weight gradient to ``square_norms``: B / M consecutive samples a group.

    A convolution is a linear layer at every position of its output, of the input's patches: d = C / groups times the kernel's elements,
    T = the positions of the output of all samples of a group. ``method``, ``products``, ``precision`` and accuracy as
    :func:`linear_square_norms_`. The CPU kernel unfolds tile by tile; other backends unfold some groups at a time into memory (M T d s
    bytes written and read). ``padding`` is with zeros: any other kind is done to ``inputs`` beforehand. Rochette et al., arXiv 1912.06015.
    """
    op = "conv_square_norms_"
    sizes = tuple(map(int, kernel_size)), tuple(map(int, stride)), tuple(map(int, padding)), tuple(map(int, dilation))
    dims = len(sizes[0])
    if dims not in (1, 2, 3) or any(len(each) != dims for each in sizes):
        raise ValueError(f"{op}: kernel_size, stride, padding and dilation must be of 1, 2 or 3 numbers each, got {sizes}")
    if min(sizes[0] + sizes[1] + sizes[3]) < 1 or min(sizes[2]) < 0:
        raise ValueError(f"{op}: kernel_size, stride and dilation must be positive and padding not negative, got {sizes}")
    check_shape(op, "grad_outputs", grad_outputs, dims + 2, "(samples, out_channels, *positions)")
    check_shape(op, "inputs", inputs, dims + 2, "(samples, in_channels, *positions)")
    samples, out_channels = grad_outputs.shape[:2]
    in_channels = inputs.shape[1]
    if groups < 1 or in_channels % groups or out_channels % groups:
        raise ValueError(f"{op}: groups={groups} does not divide {in_channels} input and {out_channels} output channels")
    expected = output_sizes(inputs.shape[2:], *sizes)
    if inputs.shape[0] != samples or tuple(grad_outputs.shape[2:]) != expected:
        raise ValueError(f"{op}: grad_outputs has shape {tuple(grad_outputs.shape)}, inputs of {tuple(inputs.shape)} give {expected}")
    m = square_norms.numel() if isinstance(square_norms, Tensor) else 0
    check_output(op, "square_norms", square_norms, (m,), torch.float64)
    if m == 0 or samples % m:
        raise ValueError(f"{op}: square_norms has {m} groups, which do not divide {samples} samples")
    weight_shape = (out_channels, in_channels // groups, *sizes[0])
    if products is not None:
        check_output(op, "products", products, (m, *weight_shape), arithmetic_dtype((inputs, grad_outputs)))
    check_how(op, method, precision, products)
    check_on(op, grad_outputs.device, {"square_norms": square_norms, "inputs": inputs, "products": products})
    if 0 in inputs.shape or 0 in grad_outputs.shape:
        if products is not None:
            products.zero_()
        return
    backend = backend_for(grad_outputs, inputs)
    in_features, tokens = math.prod(weight_shape[1:]), samples // m * math.prod(expected)
    if method == "auto":
        method = "direct" if products is not None else backend.linear_method(tokens, in_features, out_channels // groups)
    inputs, grad_outputs = inputs.contiguous(), grad_outputs.contiguous()
    if backend.conv_square_norms_ is not None:
        how = {"groups": groups, "method": method, "precision": precision}
        named = dict(zip(("kernel_size", "stride", "padding", "dilation"), sizes, strict=True))
        backend.conv_square_norms_(square_norms, inputs, grad_outputs, products, **named, **how)
        return
    each = tokens * groups * in_features * inputs.element_size()
    at_once = max(1, min(m, _UNFOLDED_BYTES // each))
    for start in range(0, m, at_once):
        stop = min(m, start + at_once)
        part = slice(start * (samples // m), stop * (samples // m))
        patches, grads = unfolded(inputs[part], grad_outputs[part], stop - start, *sizes, groups)
        norms = square_norms.new_zeros(len(patches))
        kept = None if products is None else products[start:stop].view(len(patches), out_channels // groups, in_features)
        # The reshapes of an unfolding may be views of another order.
        backend.linear_square_norms_(norms, patches.contiguous(), grads.contiguous(), kept, bias=False, method=method, precision=precision)
        square_norms[start:stop] += norms.view(stop - start, groups).sum(1)
