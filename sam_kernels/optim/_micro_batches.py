"""m-SAM's descent gradient: the mean of the gradients that the micro-batches gave at their own perturbed points (arXiv 2509.18001)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["GradientMean", "mean_loss"]


class GradientMean:
    """Mean over ``count`` gradients; a parameter without one in a micro-batch counts as zero there. One buffer per parameter."""

    def __init__(self, count: int) -> None:
        self._weight = 1.0 / count
        self._sums: dict[Tensor, Tensor] = {}

    def add(self, params: Sequence[Tensor]) -> None:
        """Adds the gradients as they are."""
        for param in params:
            if param.grad is None:
                continue
            if param in self._sums:
                self._sums[param].add_(param.grad, alpha=self._weight)
            else:
                self._sums[param] = param.grad * self._weight

    def put(self, params: Sequence[Tensor]) -> None:
        """Makes the mean the parameters' gradient."""
        for param in params:
            param.grad = self._sums.get(param)


def mean_loss(losses: Sequence[Any]) -> Any:
    """Mean of what the closures returned: a tensor where all are tensors, None where one returned None."""
    if any(loss is None for loss in losses):
        return None
    if all(isinstance(loss, Tensor) for loss in losses):
        return torch.stack([loss.detach() for loss in losses]).mean()
    return sum(losses) / len(losses)
