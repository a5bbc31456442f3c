"""How far a kernel's squared norms of linear layers may be from the exact ones, derived from its roundings, group by group."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SINGLE", "linear_bound", "operand_rounding"]

SINGLE = 2.0**-24
# Relative, of a float32 operand. bfloat16 keeps 8 bits and rounds to nearest. tf32 keeps 11, and tensor cores drop the others.
_ROUNDING = {"ieee": 0.0, "tf32": 2.0**-10, "bf16": 2.0**-8}
_TREE = 64  # roundings at most of a sum over a tile (a tree, or a chain a thread and a tree), of tiles, and of squares


def operand_rounding(operand: Tensor, precision: str) -> float:
    """16-bit operands are multiplied as they are: their products are exact in float32."""
    return _ROUNDING[precision] if operand.dtype is torch.float32 else 0.0


def linear_bound(inputs: Tensor, grads: Tensor, method: str, precision: str, *, bias: bool = False) -> Tensor:  # (M,) float64
    """First-order error analysis in absolute values: each operand is off by its rounding, each float32 sum of n terms by n SINGLE of the
    sum of their absolute values; a tenth more for all that is of second order. A ``bias`` is a feature that is 1 to the Gram form,
    and sums of their own, squared, beside the direct one."""
    a, g = inputs.double().abs(), grads.double().abs()
    of_a, of_g = operand_rounding(inputs, precision), operand_rounding(grads, precision)
    tokens, in_features, out_features = a.shape[1], a.shape[2] + bias, g.shape[2]
    one = float(bias)
    if tokens == 1 and method == "gram":
        return 1.1 * 2 * (in_features + out_features + _TREE) * SINGLE * (a.square().sum((1, 2)) + one) * g.square().sum((1, 2))
    if method == "gram":
        terms = (a @ a.mT + one) * (g @ g.mT)
        return 1.1 * (2 * of_a + 2 * of_g + (in_features + out_features + _TREE) * SINGLE) * terms.sum((1, 2))
    found = _squares_bound((grads.double().mT @ inputs.double()).abs(), (g.mT @ a) * (of_a + of_g + (tokens + 2) * SINGLE))
    if bias:
        found += _squares_bound(grads.double().sum(1).abs(), g.sum(1) * (tokens + 2) * SINGLE, out_features)
    return found


def _squares_bound(exact: Tensor, error: Tensor, terms: int = 0) -> Tensor:
    """Of a group's sum of squares of what is ``exact`` but for its ``error``; ``terms`` of a chain beside those of a tree."""
    return 1.1 * (2 * exact * error + error.square() + (terms + _TREE) * SINGLE * exact.square()).flatten(1).sum(1)
