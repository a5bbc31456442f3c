"""Low-rank adaptation (arXiv 2106.09685) in plain torch: frozen linear layers beside which two thin factors are trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.per_sample.models import Block

__all__ = ["LoRALinear", "add_lora"]


class LoRALinear(nn.Module):
    """W x + b + (scale / rank) B A x with W and b frozen (arXiv 2106.09685, equation 3). B begins at 0, A as a linear layer does.

    Args:
        linear: the layer that is adapted, (in) -> (out). Its parameters are frozen.
        rank: rows of A and columns of B.
        scale: the paper's alpha.
    """

    def __init__(self, linear: nn.Linear, rank: int = 8, scale: float = 16.0) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.empty(rank, linear.in_features))  # A
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))  # B
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.factor = scale / rank

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return self.linear(x) + self.factor * F.linear(F.linear(x, self.down), self.up)


def add_lora(model: nn.Module, rank: int = 8) -> nn.Module:
    """Freeze a model and put factors beside the attention's linear layers of each transformer block. Return the same model."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Block):
            module.qkv, module.projection = LoRALinear(module.qkv, rank), LoRALinear(module.projection, rank)
    return model
