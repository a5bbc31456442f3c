"""A convolution as a linear layer of its input's patches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pad

__all__ = ["output_sizes", "unfolded"]

Sizes = tuple[int, ...]


def output_sizes(sizes: Sequence[int], kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> Sizes:
    """How many positions the output of a convolution has, by dimension."""
    spans = [d * (k - 1) + 1 for k, d in zip(kernel_size, dilation, strict=True)]
    return tuple((n + 2 * p - span) // s + 1 for n, span, s, p in zip(sizes, spans, stride, padding, strict=True))


def unfolded(
    inputs: Tensor,  # (B, C, *positions)
    grad_outputs: Tensor,  # (B, p, *positions of the output)
    m: int,  # groups of samples
    kernel_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
) -> tuple[Tensor, Tensor]:  # (m groups, T, C / groups · kernel), (m groups, T, p / groups)
    """Patches and the gradients of their outputs, T = the output's positions of a group's samples one after the other. Copies both."""
    dims = len(kernel_size)
    samples, channels = inputs.shape[:2]
    padded = pad(inputs, [each for p in reversed(padding) for each in (p, p)]).contiguous()
    steps = padded.stride()[2:]
    positions = tuple(grad_outputs.shape[2:])
    moves = [a * each for each_of in (stride, dilation) for a, each in zip(steps, each_of, strict=True)]
    patches = padded.as_strided((samples, channels, *positions, *kernel_size), (*padded.stride()[:2], *moves))
    patches = patches.reshape(m, samples // m, groups, channels // groups, *positions, *kernel_size)
    # to (m, groups, samples of a group, *positions, channels of a group, *kernel)
    order = (0, 2, 1, *range(4, 4 + dims), 3, *range(4 + dims, 4 + 2 * dims))
    tokens = samples // m
    for each in positions:
        tokens *= each
    rows = patches.permute(order).reshape(m * groups, tokens, -1)
    split = grad_outputs.reshape(m, samples // m, groups, -1, tokens // (samples // m))
    return rows, split.permute(0, 2, 1, 4, 3).reshape(m * groups, tokens, -1)
