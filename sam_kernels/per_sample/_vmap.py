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
            values[i] = tensor.unsqueeze(batch_dim)
        sample_args, sample_kwargs = pytree.tree_unflatten(values, spec)
        output = torch.func.functional_call(module, {**params, **buffers}, sample_args, sample_kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return [tensors[i] for i in wanted]

    def sample_grads(inputs: list[Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
        vjp: Any = torch.func.vjp(lambda each: outputs(each, inputs), params)[1]
        found: dict[str, Tensor] = vjp(grads)[0]
        return found

    inputs = [leaves[i] for i in places]
    with torch.enable_grad():
        try:
            found = torch.func.vmap(sample_grads)(inputs, grads)
        except RuntimeError as error:
            if "randomness" in str(error):
                raise NotImplementedError(_RANDOM) from error
            found = _one_by_one(sample_grads, inputs, grads)  # something in it, a recurrent layer perhaps, cannot be vectorised
    return {name: grad.detach() for name, grad in found.items()}


_RANDOM = "it draws random numbers, which a second run cannot draw again"


def _one_by_one(
    sample_grads: Callable[[list[Tensor], list[Tensor]], dict[str, Tensor]], inputs: list[Tensor], grads: list[Tensor]
) -> dict[str, Tensor]:
    device = grads[0].device
    on_device = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(on_device):
        before = _random_states(on_device)
        try:
            found = [sample_grads([each[b] for each in inputs], [each[b] for each in grads]) for b in range(len(grads[0]))]
        except RuntimeError as error:
            raise NotImplementedError(
                f"it cannot be called with one sample: every tensor needs the batch where the output has it: {error}"
            ) from error
        drawn = any(not torch.equal(a, b) for a, b in zip(before, _random_states(on_device), strict=True))
    if drawn:
        raise NotImplementedError(_RANDOM)
    return {name: torch.stack([each[name] for each in found]) for name in found[0]}


def _random_states(devices: list[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
