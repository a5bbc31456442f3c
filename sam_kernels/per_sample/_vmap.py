"""The way out for a module without a rule: its part of the backward pass once more, sample by sample, by ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

__all__ = ["by_vmap"]


def by_vmap(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], grad_output: Any, *, batch_dim: int
) -> dict[str, Tensor]:  # (B, *parameter.shape)
    """A rule for any module whose samples do not depend on each other. Forms every sample's gradient, and runs the module again.

    Raises NotImplementedError where samples do depend on each other, or the module draws random numbers.
    """
    for child in module.modules():
        if isinstance(child, _BatchNorm) and (child.training or child.running_mean is None):
            raise NotImplementedError(f"{type(child).__name__} inside it takes its statistics from the whole batch")
    params = {name: param.detach() for name, param in module.named_parameters(recurse=False) if param.requires_grad}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    leaves, spec = pytree.tree_flatten((args, kwargs))
    given = pytree.tree_leaves(grad_output)
    wanted = [i for i, grad in enumerate(given) if grad is not None]
    grads = [given[i].unsqueeze(1 + batch_dim) for i in wanted]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == len(grads[0])]

    def outputs(params: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
        values = list(leaves)
        for i, tensor in zip(places, inputs, strict=True):
            values[i] = tensor
        sample_args, sample_kwargs = pytree.tree_unflatten(values, spec)
        output = torch.func.functional_call(module, {**params, **buffers}, sample_args, sample_kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return [tensors[i] for i in wanted]

    def sample_grads(inputs: list[Tensor], grads: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        one = [tensor.unsqueeze(batch_dim) for tensor in inputs]
        found: Any = torch.func.vjp(lambda each: outputs(each, one), params)
        return found[1](grads)[0], found[0]

    inputs = [leaves[i] for i in places]
    with torch.enable_grad():
        try:
            found, made = torch.func.vmap(sample_grads)(inputs, grads)
        except _NOT_ALONE as error:
            if "randomness" in str(error):
                raise NotImplementedError(_RANDOM) from error
            found, made = _one_by_one(sample_grads, inputs, grads)  # something in it, a recurrent layer perhaps, cannot be vectorised
    with torch.no_grad():
        whole = outputs(params, [tensor.movedim(0, batch_dim) for tensor in inputs])
    for sample, batch in zip(made, whole, strict=True):
        if not _is_close(sample.squeeze(1 + batch_dim), batch.movedim(batch_dim, 0)):
            raise NotImplementedError(
                "its output for one sample is not what it is in the batch: samples depend on each other, or a tensor it is called with has "
                "the batch's size in dimension 0 and is none"
            )
    return {name: grad.detach() for name, grad in found.items()}


def _is_close(a: Tensor, b: Tensor) -> bool:
    """But for the rounding of another order: what this is to find is wrong altogether."""
    if a.numel() == 0:
        return True
    loose = 0.05 if a.element_size() < 4 else 1e-3
    return bool(torch.isclose(a, b, rtol=loose, atol=loose * b.abs().nan_to_num().max().item(), equal_nan=True).all())


_NOT_ALONE = (RuntimeError, IndexError, ValueError, TypeError)  # of a module that expects the whole batch, rows of it by number perhaps
_RANDOM = "it draws random numbers, which a second run cannot draw again"


def _one_by_one(
    sample_grads: Callable[[list[Tensor], list[Tensor]], tuple[dict[str, Tensor], list[Tensor]]], inputs: list[Tensor], grads: list[Tensor]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    device = grads[0].device
    on_device = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(on_device):
        before = _random_states(on_device)
        try:
            found = [sample_grads([each[b] for each in inputs], [each[b] for each in grads]) for b in range(len(grads[0]))]
        except _NOT_ALONE as error:
            raise NotImplementedError(
                f"it cannot be called with one sample: every tensor needs the batch where the output has it: {error}"
            ) from error
        drawn = any(not torch.equal(a, b) for a, b in zip(before, _random_states(on_device), strict=True))
    if drawn:
        raise NotImplementedError(_RANDOM)
    grads_of, made = zip(*found, strict=True)
    stacked = {name: torch.stack([each[name] for each in grads_of]) for name in grads_of[0]}
    return stacked, [torch.stack(each) for each in zip(*made, strict=True)]


def _random_states(devices: list[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
