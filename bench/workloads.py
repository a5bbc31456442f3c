"""Workloads: the parameter shapes of real models. Only shapes matter to an optimizer, so no model is built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DTYPES", "WORKLOADS", "Workload", "make_grads", "make_params"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """``sets``: how often optimizers are made anew, because where small tensors lie in memory moves a step by some percent."""

    name: str
    title: str
    shapes: tuple[Shape, ...]
    sets: int = 1

    @property
    def n_tensors(self) -> int:
        return len(self.shapes)

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


def _resnet18() -> list[Shape]:
    """torchvision's ResNet-18: convolutions without bias, each followed by a BatchNorm's weight and bias."""

    def conv(out: int, channels: int, kernel: int) -> list[Shape]:
        return [(out, channels, kernel, kernel), (out,), (out,)]

    shapes = conv(64, 3, 7)
    channels = 64
    for out in (64, 128, 256, 512):
        shapes += conv(out, channels, 3) + conv(out, out, 3)
        if out != channels:
            shapes += conv(out, channels, 1)
        shapes += conv(out, out, 3) + conv(out, out, 3)
        channels = out
    return [*shapes, (1000, 512), (1000,)]


def _gpt2_124m() -> list[Shape]:
    """GPT-2 small with the output head tied to the token embedding."""
    d = 768
    attention = [(d, 3 * d), (3 * d,), (d, d), (d,)]
    mlp = [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    layer_norm = [(d,), (d,)]
    return [(50257, d), (1024, d), *(layer_norm + attention + layer_norm + mlp) * 12, *layer_norm]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("resnet18", "ResNet-18", tuple(_resnet18()), sets=2),
        Workload("gpt2_124m", "GPT-2 124M", tuple(_gpt2_124m())),
        Workload("many_tiny", "1,000 × 3", ((3,),) * 1000, sets=8),
    )
}


def make_grads(shapes: Sequence[Shape], dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


def make_params(grads: Sequence[Tensor]) -> list[torch.nn.Parameter]:
    """Parameters of their own memory that share the given gradients: the same data for every provider, drawn once."""
    params = []
    for grad in grads:
        param = torch.nn.Parameter(grad * 0.02)
        param.grad = grad
        params.append(param)
    return params
