"""What a training step has to compute and to move, counted from the model: the derivation behind its bars."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.byte_model import OPS, STEP_OPS

__all__ = ["Work", "base_step_bytes", "work_of"]

# Elements that are read and written for each element of a normalisation layer's output: its input as float32 (1 + 2), normalised (2 + 2),
# then times the output's gradient (2 + 1), counted in units of two bytes.
NORM_LAYER_ACCESSES = 10
SCALER_SWEEPS = 2  # GradScaler.step reads and writes every gradient for a base optimizer that it hands the scale to


@dataclass(frozen=True)
class Work:
    """``pass_flops``: one forward and backward pass. ``norm_flops``, ``norm_bytes``: what gradient norms per sample add to it."""

    pass_flops: int
    norm_flops: int
    norm_bytes: int


def base_step_bytes(base: str, numel: int, itemsize: int, *, scales: bool) -> int:
    """Bytes of one step of torch's fused optimizer: as many as ours, which reads backups in the place of the parameters."""
    return (OPS[STEP_OPS[base][-1]].passes + (SCALER_SWEEPS if scales else 0)) * numel * itemsize


def work_of(make: Callable[[], nn.Module], inputs: Callable[[], tuple[Tensor, Tensor]], itemsize: int) -> Work:
    """Counted on the meta device: nothing is computed or allocated. ``itemsize``: bytes of an activation."""
    with torch.device("meta"):
        model = make()
        x, _ = inputs()
    found: list[tuple[int, int]] = []
    hooks = [module.register_forward_hook(_counting(found, itemsize)) for module in model.modules()]
    with FlopCounterMode(display=False) as counter:
        outputs = model(x)
        for hook in hooks:
            hook.remove()
        outputs.sum().backward()
    flops, nbytes = (sum(values) for values in zip(*found, strict=True))
    return Work(counter.get_total_flops(), flops, nbytes)


def _counting(found: list[tuple[int, int]], itemsize: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """Notes (flops, bytes) of each layer's norms."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        batch = output.shape[0]
        if isinstance(module, nn.Linear):
            d, p = module.in_features, module.out_features
            tokens = output.numel() // (batch * p)
            found.append((batch * _product_flops(tokens, d, p), batch * tokens * (d + 3 * p) * itemsize))
        elif isinstance(module, nn.Conv2d):
            d, p = module.weight[0].numel(), module.out_channels
            tokens = output.numel() // (batch * p)
            # Patches and gradients are copied (read, written, read by the product); the gradients once more, weighted.
            found.append((batch * _product_flops(tokens, d, p), batch * tokens * 3 * (d + p) * itemsize + 2 * output.numel() * itemsize))
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            found.append((0, NORM_LAYER_ACCESSES * output.numel() * 2))

    return hook


def _product_flops(tokens: int, d: int, p: int) -> int:
    """Of one sample by the form that has less to do (docs/per_sample.md). A linear layer of one token needs two norms."""
    return min(tokens * tokens * (d + p), 2 * tokens * d * p)
