"""The forms in which a layer's rule gives a parameter's gradient of every sample, without multiplying it out.

B samples; a group is a sample or a micro-batch of consecutive ones. All terms belong to the gradient of the sum of the samples' losses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sam_kernels._tensor_list import arithmetic_dtype
from sam_kernels.functional.per_sample import affine_grads_, conv_square_norms_, embedding_square_norms_, linear_square_norms_

__all__ = ["Convolution", "Dense", "Form", "Outer", "Place", "Rows", "Shift", "Term", "affine_grads", "shape_of"]

Place = tuple[int, int]  # the first row of a parameter, and the row after the last
_KEPT_PER_ACTIVATION = 4
_FLOPS_PER_KEPT = 80  # an element kept is written and read again: 8 bytes, the time of so many flops where 15 GB/s meet 150 GFLOPS


class Term(Protocol):
    """One parameter's gradients, of every sample: one of the forms below, which rules return, or several of them joined."""

    def add_square_norms_(self, square_norms: Tensor, *, keep: bool) -> None:  # (M,) float64
        """Add the squared norm of each group's gradient. With ``keep``, products may be kept for :meth:`weighted`, which follows."""

    def weighted(self, weights: Tensor | None, shape: torch.Size) -> Tensor:  # (M,) -> the parameter's shape
        """Return the sum over the groups of weight times gradient. None: weights of 1."""


@dataclass
class Dense:
    """The gradients themselves: (B, *shape). For parameters as small as a bias."""

    grads: Tensor

    def sizes(self) -> tuple[int, ...]:
        return tuple(self.grads.shape)

    def fits(self, batch: int, shape: torch.Size) -> bool:
        return tuple(self.grads.shape) == (batch, *shape)

    def add_square_norms_(self, square_norms: Tensor, *, keep: bool) -> None:
        grads = self.of_groups(square_norms.shape[0])
        one = grads.new_ones(1).expand(len(grads), 1, 1)
        linear_square_norms_(square_norms, one, grads.unsqueeze(1))  # one read, no temporary

    def weighted(self, weights: Tensor | None, shape: torch.Size) -> Tensor:
        grads = self.grads if weights is None else self.of_groups(weights.shape[0])
        return _weighted_sum(weights, grads.to(arithmetic_dtype((grads,)))).view(shape)

    def sample_grads(self, part: slice, shape: torch.Size) -> Tensor:  # -> (samples of part, *shape)
        """The gradients of some samples, multiplied out. All forms but :class:`Shift` have this method."""
        return self.grads[part].reshape(-1, *shape)

    def of_groups(self, m: int) -> Tensor:  # (M, numel) in the arithmetic type
        samples = self.grads.shape[0]
        grads = self.grads.reshape(samples, -1)
        return grads if samples == m else grads.view(m, samples // m, -1).sum(1, dtype=arithmetic_dtype((grads,)))


@dataclass
class Outer:
    """The sum over t of left_t right_t': (B, T, p) and (B, T, d) for a parameter of shape (p, d), as of a linear layer.

    Either may lie in memory with T before B.
    """

    left: Tensor
    right: Tensor
    products: Tensor | None = field(default=None, init=False)  # (M, p, d), kept

    def __post_init__(self) -> None:
        if self.left.dim() != 3 or self.right.dim() != 3 or self.left.shape[:2] != self.right.shape[:2]:
            raise ValueError(f"Outer: expected (B, T, p) and (B, T, d), got {tuple(self.left.shape)} and {tuple(self.right.shape)}")

    def sizes(self) -> tuple[int, ...]:
        return (len(self.left), self.left.shape[2], self.right.shape[2])

    def fits(self, batch: int, shape: torch.Size) -> bool:
        return len(shape) > 0 and self.sizes() == (batch, shape[0], shape[1:].numel())

    def add_square_norms_(self, square_norms: Tensor, *, keep: bool, with_shift: bool = False) -> None:
        """``with_shift``: those of the sum over t of left_t too."""
        m = square_norms.shape[0]
        tokens = self.left.shape[0] // m * self.left.shape[1]
        left, right = (each.reshape(m, tokens, each.shape[2]) for each in (self.left, self.right))
        if keep and _worth_keeping(m, left.shape[1], left.shape[2], right.shape[2]):
            self.products = left.new_empty((m, left.shape[2], right.shape[2]), dtype=arithmetic_dtype((left, right)))
        linear_square_norms_(square_norms, right, left, self.products, bias=with_shift)
        if self.products is not None:
            self.left = self.right = self.products.new_empty(0)  # no longer needed

    @property
    def gives_shift(self) -> bool:
        """Whether :meth:`weighted_with_shift` saves a read of left: it is left that is scaled, in no less than 32 bits."""
        return self.products is None and self.left.shape[2] <= self.right.shape[2] and self.left.element_size() > 2

    def weighted_with_shift(self, weights: Tensor | None, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """The weighted sum, and that of the sum over t of left_t, from left as it has just been scaled."""
        scaled = Outer(_scaled(self.left, weights), self.right)
        shift = scaled.left.sum((0, 1))
        return scaled.weighted(None, shape), shift

    def weighted(self, weights: Tensor | None, shape: torch.Size) -> Tensor:
        if self.products is not None:
            return _weighted_sum(weights, self.products).view(shape)
        left, right = self.left, self.right
        dtype = torch.promote_types(left.dtype, right.dtype)
        weights, top = _relative(weights, dtype)
        if left.shape[2] < right.shape[2]:
            left = _scaled(left, weights)
        else:
            right = _scaled(right, weights)
        if left.stride(0) < left.stride(1):  # T before B: the larger tensor need not be copied, and a sum has no order
            left, right = left.transpose(0, 1), right.transpose(0, 1)
        return _times((left.to(dtype).flatten(0, 1).mT @ right.to(dtype).flatten(0, 1)).view(shape), top)

    def sample_grads(self, part: slice, shape: torch.Size) -> Tensor:
        left, right = self.left[part], self.right[part]
        dtype = arithmetic_dtype((left, right))
        return torch.bmm(left.mT.to(dtype), right.to(dtype)).reshape(-1, *shape)


@dataclass
class Shift:
    """The sum over t of left_t: (B, T, p) for a parameter of p elements, as of a linear layer's bias."""

    left: Tensor

    def sizes(self) -> tuple[int, ...]:
        return (len(self.left), self.left.shape[2])

    def fits(self, batch: int, shape: torch.Size) -> bool:
        return self.sizes() == (batch, shape.numel())

    def add_square_norms_(self, square_norms: Tensor, *, keep: bool) -> None:
        self.dense().add_square_norms_(square_norms, keep=keep)

    def weighted(self, weights: Tensor | None, shape: torch.Size) -> Tensor:
        if weights is None:
            return self.left.sum((0, 1), dtype=arithmetic_dtype((self.left,))).view(shape)
        return self.dense().weighted(weights, shape)

    def dense(self) -> Dense:
        return Dense(self.left[:, 0] if self.left.shape[1] == 1 else affine_grads(self.left.unsqueeze(3))[1])


def affine_grads(grad_output: Tensor, normalized: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(B, S, C, L) -> (B, C) gradients of the scale, where there are ``normalized`` values, and of the shift."""
    dtype = arithmetic_dtype((grad_output, normalized))
    if grad_output.shape[1] == 1 == grad_output.shape[3] and grad_output.dtype is dtype:  # one position: nothing to add up
        shift = grad_output[:, 0, :, 0]
        return shift if normalized is None else shift * normalized[:, 0, :, 0], shift
    weight_grads, bias_grads = (grad_output.new_empty(grad_output.shape[0], grad_output.shape[2], dtype=dtype) for _ in range(2))
    affine_grads_(None if normalized is None else weight_grads, bias_grads, normalized, grad_output)
    return weight_grads, bias_grads


@dataclass
class Convolution:
    """The gradient of a convolution's weight from its input (B, C, *positions) and the gradient of its output (B, p, *positions)."""

    inputs: Tensor
    grad_outputs: Tensor
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    products: Tensor | None = field(default=None, init=False)  # (M, *weight), kept

    def sizes(self) -> tuple[int, ...]:
        return (len(self.inputs), self.grad_outputs.shape[1], self.inputs.shape[1] // self.groups, *self.kernel_size)

    def fits(self, batch: int, shape: torch.Size) -> bool:
        return len(self.inputs) == len(self.grad_outputs) and self.sizes() == (batch, *shape)

    def add_square_norms_(self, square_norms: Tensor, *, keep: bool) -> None:
        m, x, g = square_norms.shape[0], self.inputs, self.grad_outputs
        weight = (g.shape[1], x.shape[1] // self.groups, *self.kernel_size)
        tokens = len(x) // m * math.prod(g.shape[2:])
        if keep and _worth_keeping(m, tokens, weight[0], math.prod(weight[1:]), x.numel() + g.numel()):
            self.products = g.new_empty((m, *weight), dtype=arithmetic_dtype((x, g)))
        conv_square_norms_(square_norms, x, g, self.products, **self._options())
        if self.products is not None:
            self.inputs = self.grad_outputs = self.products.new_empty(0)  # no longer needed

    def weighted(self, weights: Tensor | None, shape: torch.Size) -> Tensor:
        if self.products is not None:
            return _weighted_sum(weights, self.products).view(shape)
        weights, top = _relative(weights, self.grad_outputs.dtype)
        return _times(self._weight_grad(self.inputs, _scaled(self.grad_outputs, weights), shape), top)

    def sample_grads(self, part: slice, shape: torch.Size) -> Tensor:
        pairs = zip(self.inputs[part], self.grad_outputs[part], strict=True)
        return torch.stack([self._weight_grad(x[None], g[None], shape) for x, g in pairs])

    def _weight_grad(self, x: Tensor, g: Tensor, shape: torch.Size) -> Tensor:
        x = x.to(g.dtype)
        like = g.new_empty(1).expand(shape)  # only its shape is read
        none = [0] * len(self.kernel_size)
        grads: Any = torch.ops.aten.convolution_backward(
            g, x, like, None, self.stride, self.padding, self.dilation, False, none, self.groups, (False, True, False)
        )
        weight_grad: Tensor = grads[1]
        return weight_grad

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups")}


@dataclass
class Rows:
    """Row indices_t collects values_t: (B, T) integers and (B, T, D) for a parameter of shape (rows, D), as of an embedding."""

    indices: Tensor
    values: Tensor
    padding_idx: int | None = None

    def __post_init__(self) -> None:
        if self.values.dim() != 3 or self.indices.shape != self.values.shape[:2]:
            raise ValueError(f"Rows: expected (B, T) and (B, T, D), got {tuple(self.indices.shape)} and {tuple(self.values.shape)}")

    def sizes(self) -> tuple[int, ...]:
        return (len(self.indices), -1, self.values.shape[2])

    def fits(self, batch: int, shape: torch.Size) -> bool:
        return len(shape) == 2 and self.sizes() == (batch, -1, shape[1])

    def add_square_norms_(self, square_norms: Tensor, *, keep: bool) -> None:
        m = square_norms.shape[0]
        indices, values = self.indices.reshape(m, -1), self.values.reshape(m, -1, self.values.shape[2])
        embedding_square_norms_(square_norms, indices, values, padding_idx=self.padding_idx)

    def weighted(self, weights: Tensor | None, shape: torch.Size) -> Tensor:
        weights, top = _relative(weights, self.values.dtype)
        return _times(self._grad(_scaled(self.values, weights), self.indices, shape), top)

    def sample_grads(self, part: slice, shape: torch.Size) -> Tensor:
        pairs = zip(self.values[part], self.indices[part], strict=True)
        return torch.stack([self._grad(values, indices, shape) for values, indices in pairs])

    def _grad(self, values: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
        padding = -1 if self.padding_idx is None else self.padding_idx
        grad: Tensor = torch.ops.aten.embedding_dense_backward(values, indices, shape[0], padding, False)
        return grad


Form = Convolution | Dense | Outer | Rows  # forms that can be multiplied out, sample by sample


def shape_of(param: Tensor, place: Place | None) -> torch.Size:
    """The shape of the rows of a parameter at a place; None: of the whole parameter."""
    return param.shape if place is None else torch.Size((place[1] - place[0], *param.shape[1:]))


def _worth_keeping(m: int, tokens: int, out_features: int, in_features: int, activations: int | None = None) -> bool:
    """Whether to form every group's product once and keep it, so that a weighted gradient is a weighted sum of them.

    It saves the other method's work and costs M p d elements of memory, written and read.
    """
    activations = m * tokens * (in_features + out_features) if activations is None else activations
    if m * out_features * in_features > _KEPT_PER_ACTIVATION * activations:
        return False
    return tokens * tokens * (in_features + out_features) > _FLOPS_PER_KEPT * out_features * in_features


def _weighted_sum(weights: Tensor | None, grads: Tensor) -> Tensor:  # (M,), (M, ...) -> (elements,)
    rows = grads.reshape(len(grads), -1)
    return rows.sum(0) if weights is None else torch.mv(rows.mT, weights.to(grads.dtype))


def _relative(weights: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Weights by their largest, and that, where they are to multiply numbers of 16 bits: small ones would lose their digits, or vanish."""
    if weights is None or dtype.itemsize > 2:
        return weights, None
    top = weights.abs().max()
    top = torch.where(top > 0, top, 1.0)
    return weights / top, top


def _times(grad: Tensor, top: Tensor | None) -> Tensor:
    return grad if top is None else grad.to(torch.float32) * top


def _scaled(tensor: Tensor, weights: Tensor | None) -> Tensor:  # (B, ...) by the weight of each sample's group
    if weights is None:
        return tensor
    each = weights.to(tensor.dtype)
    if tensor.shape[0] != weights.shape[0]:
        each = each.repeat_interleave(tensor.shape[0] // weights.shape[0])
    return tensor * each.view(-1, *(1,) * (tensor.dim() - 1))
