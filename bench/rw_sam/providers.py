"""Whole optimizer steps, forward and backward passes included: SAM on the batch's mean loss, and RWSAM with each kind of norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import sam_kernels
from bench.per_sample.models import Problem
from sam_kernels.per_sample import GradNorms

__all__ = ["PROVIDERS", "Provider", "has_norm_layers"]

# A step so small that every round is the same round: training on one batch would end with gradients of 0.
BASE: dict[str, Any] = {"lr": 1e-6, "momentum": 0.9}
NORM_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Provider:
    title: str
    options: dict[str, Any] = field(default_factory=dict)  # of RWSAM; none: SAM

    def missing(self, problem: Problem) -> str | None:
        if self.options.get("norms") == "norm_layers" and not has_norm_layers(problem.model):
            return "the model has no normalisation layers"
        return None

    def make(self, problem: Problem) -> Callable[[], object]:
        """Prepares once; what it returns is timed."""
        model = problem.model
        if not self.options:
            return _sam(problem)
        optimizer = sam_kernels.RWSAM(model, torch.optim.SGD, beta=_beta(problem), **self.options, **BASE)
        return lambda: optimizer.step(problem.losses)


def _sam(problem: Problem) -> Callable[[], object]:
    optimizer = sam_kernels.SAM(problem.model.parameters(), torch.optim.SGD, model=problem.model, **BASE)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.losses().mean()
        loss.backward()
        return loss.detach()

    return lambda: optimizer.step(closure)


def _beta(problem: Problem) -> float:
    """The scale of the norms: weights that differ, none of which is 0."""
    with GradNorms(problem.model) as engine:
        losses = problem.losses()
    return 1.0 / engine(losses, keep=False).mean().item()


def has_norm_layers(model: nn.Module) -> bool:
    return any(isinstance(module, NORM_LAYERS) for module in model.modules())


PROVIDERS = {
    "sam": Provider("SAM"),
    "exact": Provider("RWSAM, exact norms", {"norms": "exact"}),
    "finite_difference": Provider("RWSAM, finite differences, K = 1", {"norms": "finite_difference"}),
    "jvp": Provider("RWSAM, directional derivatives, K = 1", {"norms": "jvp"}),
    "last_layer": Provider("RWSAM, norms of the last layer", {"norms": "last_layer"}),
    "norm_layers": Provider("RWSAM, norms of the normalisation layers", {"norms": "norm_layers"}),
}
