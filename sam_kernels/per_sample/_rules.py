"""The rules of torch's own layers. Formulas: docs/per_sample.md; the engine: docs/internals/per_sample.md."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_kernels._tensor_list import arithmetic_dtype
from sam_kernels.per_sample._registry import Rule, register_rule
from sam_kernels.per_sample._terms import Convolution, Dense, Outer, Rows, Shift, Term, affine_grads

__all__ = ["is_trainable", "linear_terms", "with_statistics"]

Terms = dict[str, Tensor | Term]


def is_trainable(module: nn.Module, name: str) -> bool:
    """Whether the module has such a parameter, and it wants a gradient."""
    param = module._parameters.get(name)  # a property would be computed anew
    return param is not None and param.requires_grad


def linear_terms(x: Tensor, grad_output: Tensor, *, weight: bool, bias: bool) -> Terms:
    """Of y = x weight' + bias, with x (B, ..., d) and the gradient of y (B, ..., p)."""
    if x.dim() < 2:
        raise NotImplementedError("an input of one dimension has no batch")
    x, g = _sequence(x), _sequence(grad_output)
    terms: Terms = {}
    if weight:
        terms["weight"] = Outer(g, _as_multiplied(x, g))
    if bias:
        terms["bias"] = Shift(g)
    return terms


def _as_multiplied(x: Tensor, grad_output: Tensor) -> Tensor:
    """Autocast rounds a layer's input to the type of its output, and so do the gradients that autograd would find."""
    return x.to(grad_output.dtype) if grad_output.element_size() < x.element_size() else x


def _sequence(tensor: Tensor) -> Tensor:  # (B, ..., n) -> (B, T, n)
    if tensor.dim() == 3:
        return tensor
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


@register_rule(nn.Linear)
def _linear(module: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], grad_output: Tensor) -> Terms:
    return linear_terms(_input(args, kwargs), grad_output, weight=is_trainable(module, "weight"), bias=is_trainable(module, "bias"))


@register_rule(nn.Conv1d)
@register_rule(nn.Conv2d)
@register_rule(nn.Conv3d)
def _conv(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grad_output: Tensor) -> Terms:
    terms: Terms = {}
    if is_trainable(module, "weight"):
        x, padding = _padded(module, _as_multiplied(_input(args, kwargs), grad_output))
        terms["weight"] = Convolution(x, grad_output, module.kernel_size, module.stride, padding, module.dilation, module.groups)
    if is_trainable(module, "bias"):
        terms["bias"] = Dense(affine_grads(_planes(grad_output))[1])
    return terms


def _padded(module: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with its padding, where that is not one of zeros, the same on both sides; and what is left to pad."""
    none = (0,) * len(module.kernel_size)
    if module.padding_mode != "zeros":
        return F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), none
    if module.padding == "valid":
        return x, none
    if module.padding == "same":
        return F.pad(x, module._reversed_padding_repeated_twice), none
    return x, module.padding


@register_rule(nn.ConvTranspose1d)
@register_rule(nn.ConvTranspose2d)
@register_rule(nn.ConvTranspose3d)
def _transposed_conv(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grad_output: Tensor) -> Terms:
    """The convolution whose transpose this is takes the output's gradient to the input: they change places."""
    terms: Terms = {}
    if is_trainable(module, "weight"):
        x = _input(args, kwargs)
        g, padding = _reached(module, grad_output, x)
        terms["weight"] = Convolution(g, x, module.kernel_size, module.stride, padding, module.dilation, module.groups)
    if is_trainable(module, "bias"):
        terms["bias"] = Dense(affine_grads(_planes(grad_output))[1])
    return terms


def _reached(module: Any, grad_output: Tensor, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The output's gradient and its padding, without positions behind the last that the input reaches where there is room for one more.

    ``output_padding`` is less than the stride or the dilation; where it is at least the stride, a convolution would have more positions.
    """
    sizes = zip(x.shape[2:], module.kernel_size, module.stride, module.padding, module.dilation, grad_output.shape[2:], strict=True)
    surplus = [n + 2 * p - (size - 1) * s - d * (k - 1) - 1 for size, k, s, p, d, n in sizes]
    if all(more < s for more, s in zip(surplus, module.stride, strict=True)):
        return grad_output, module.padding
    ends = [(p, p - more) for p, more in zip(module.padding, surplus, strict=True)]
    return F.pad(grad_output, [each for pair in reversed(ends) for each in pair]), (0,) * len(ends)


@register_rule(nn.Embedding)
def _embedding(module: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any], grad_output: Tensor) -> Terms:
    if module.scale_grad_by_freq:
        raise NotImplementedError("scale_grad_by_freq divides by counts over the whole batch: no sample has a gradient of its own")
    indices = _input(args, kwargs)
    return {"weight": Rows(indices.reshape(len(indices), -1), _sequence(grad_output), module.padding_idx)}


@register_rule(nn.EmbeddingBag)
def _embedding_bag(module: nn.EmbeddingBag, args: tuple[Any, ...], kwargs: dict[str, Any], grad_output: Tensor) -> Terms:
    """An embedding whose rows get the bag's gradient, each times its weight in the bag."""
    if module.scale_grad_by_freq:
        raise NotImplementedError("scale_grad_by_freq divides by counts over the whole batch: no sample has a gradient of its own")
    indices, offsets, weights = (_argument(args, kwargs, i, name) for i, name in enumerate(("input", "offsets", "per_sample_weights")))
    indices, inside, weights = _bags(module, indices, offsets, weights)
    padding = module.padding_idx
    if padding is not None:
        inside = inside & (indices != padding)
    if module.mode == "max":
        values = _largest(module.weight.detach()[indices], inside) * grad_output.unsqueeze(1)
    else:
        share = inside.to(grad_output.dtype) if weights is None else weights.to(grad_output.dtype) * inside
        if module.mode == "mean":
            share = share / inside.sum(1, keepdim=True).clamp(min=1)
        values = share.unsqueeze(2) * grad_output.unsqueeze(1)
    return {"weight": Rows(indices, values, padding)}


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _bags(module: Any, indices: Tensor, offsets: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Indices (B, T), which of them are in the bag, and their weights. Bags of other lengths than the longest are filled up."""
    if offsets is None:
        return indices, torch.ones_like(indices, dtype=torch.bool), weights
    end = offsets.new_tensor([len(indices)])
    starts, ends = (offsets[:-1], offsets[1:]) if module.include_last_offset else (offsets, torch.cat([offsets[1:], end]))
    lengths = ends - starts
    places = torch.arange(max(1, int(lengths.max())), device=offsets.device)
    inside = places < lengths.unsqueeze(1)
    at = torch.where(inside, starts.unsqueeze(1) + places, 0)
    if len(indices) == 0:  # bags without anything in them
        return torch.zeros_like(at), inside, None
    return torch.where(inside, indices[at], 0), inside, None if weights is None else weights[at]


def _largest(values: Tensor, inside: Tensor) -> Tensor:  # (B, T, D), (B, T) -> (B, T, D)
    """1 at the first of the largest values of every bag and feature, else 0."""
    values = values.masked_fill(~inside.unsqueeze(2), -math.inf)
    is_largest = (values == values.amax(1, keepdim=True)) & inside.unsqueeze(2)
    return (is_largest & (is_largest.cumsum(1) == 1)).to(values.dtype)


@register_rule(nn.LayerNorm)
@register_rule(nn.RMSNorm)
def _layer_norm(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grad_output: Tensor) -> Terms:
    x = _arithmetic(_input(args, kwargs))
    size = math.prod(module.normalized_shape)

    def normalized() -> Tensor:
        if isinstance(module, nn.RMSNorm):
            return F.rms_norm(x, module.normalized_shape, eps=module.eps)
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)

    return _affine(module, grad_output.reshape(len(x), -1, size, 1), normalized)


@register_rule(nn.GroupNorm)
def _group_norm(module: nn.GroupNorm, args: tuple[Any, ...], kwargs: dict[str, Any], grad_output: Tensor) -> Terms:
    x = _arithmetic(_input(args, kwargs))
    return _affine(module, _planes(grad_output), lambda: F.group_norm(x, module.num_groups, eps=module.eps))


@register_rule(nn.InstanceNorm1d)
@register_rule(nn.InstanceNorm2d)
@register_rule(nn.InstanceNorm3d)
def _instance_norm(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grad_output: Tensor) -> Terms:
    x = _arithmetic(_input(args, kwargs))
    own = module.training or not module.track_running_stats
    mean, var = (None, None) if own else (module.running_mean, module.running_var)
    return _affine(module, _planes(grad_output), lambda: F.instance_norm(x, mean, var, use_input_stats=own, momentum=0.0, eps=module.eps))


@register_rule(nn.BatchNorm1d)
@register_rule(nn.BatchNorm2d)
@register_rule(nn.BatchNorm3d)
def _batch_norm(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grad_output: Tensor, *, statistics: tuple[Tensor, Tensor] | None = None
) -> Terms:
    """In training the statistics are the batch's: what is found is each sample's part of the sum that is the batch's gradient.

    ``statistics``: the batch's mean and 1 / √(variance + eps), (C,) each, which the forward pass has computed.
    """
    x = _arithmetic(_input(args, kwargs))
    own, eps = module.training or module.running_mean is None, module.eps
    mean, var = (None, None) if own else (module.running_mean, module.running_var)
    if own and statistics is not None:
        own, eps, mean, var = False, 0.0, statistics[0], statistics[1].square().reciprocal()
    return _affine(module, _planes(grad_output), lambda: F.batch_norm(x, mean, var, training=own, momentum=0.0, eps=eps))


def with_statistics(rule: Rule, output: Tensor) -> Rule:
    """The rule for one call of a layer: that of BatchNorm with what the node of the ``output`` has kept."""
    node: Any = output.grad_fn
    if rule is not _batch_norm or type(node).__name__ not in ("NativeBatchNormBackward0", "CudnnBatchNormBackward0"):
        return rule
    mean, rstd = node._saved_result1, node._saved_result2
    return partial(rule, statistics=(mean, rstd)) if mean.numel() else rule


@register_rule(nn.PReLU)
def _prelu(module: nn.PReLU, args: tuple[Any, ...], kwargs: dict[str, Any], grad_output: Tensor) -> Terms:
    """y = max(x, 0) + weight min(x, 0), with a weight for each channel or one for all."""
    x = _input(args, kwargs)
    per_channel = module.num_parameters > 1
    g, low = (_planes(each) if per_channel else each.reshape(len(each), 1, 1, -1) for each in (grad_output, x.clamp(max=0.0)))
    return {"weight": Dense(affine_grads(g, low)[0])}


def _affine(module: Any, grad_output: Tensor, normalized: Any) -> Terms:  # (B, S, C, L)
    weight, bias = is_trainable(module, "weight"), is_trainable(module, "bias")
    values = normalized().reshape(grad_output.shape) if weight else None
    weight_grads, bias_grads = affine_grads(grad_output, values)
    terms: Terms = {}
    if weight:
        terms["weight"] = Dense(weight_grads.view(-1, *module.weight.shape))
    if bias:
        terms["bias"] = Dense(bias_grads.view(-1, *module.bias.shape))
    return terms


def _planes(tensor: Tensor) -> Tensor:  # (B, C, *positions) -> (B, 1, C, L)
    return tensor.reshape(len(tensor), 1, tensor.shape[1], -1)


def _arithmetic(x: Tensor) -> Tensor:
    """Normalised in float32 at least, as under autocast."""
    return x.to(arithmetic_dtype((x,)))


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A layer's one tensor, by whichever name it was given."""
    tensor: Tensor = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
    return tensor
