"""The best one can do with ``torch._foreach_`` alone: backups kept between steps, no temporaries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from bench.providers.base import RHO, Base, Closure, Provider, Stepper, fused_or_foreach

__all__ = ["PROVIDERS", "LeanSAM"]


class LeanSAM:
    def __init__(self, params: Sequence[torch.nn.Parameter], base_optimizer: torch.optim.Optimizer, rho: float) -> None:
        self.params = list(params)
        self.base_optimizer = base_optimizer
        self.old_params = [torch.empty_like(p, requires_grad=False) for p in self.params]
        self.rho = rho
        self.mean_grads: list[Tensor] = []

    @torch.no_grad()
    def first_step(self) -> None:
        self._ascend(save=True)

    def _ascend(self, *, save: bool) -> None:
        grads = [p.grad for p in self.params if p.grad is not None]
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
        scale = self.rho / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-12)
        if save:
            torch._foreach_copy_(self.old_params, self.params)
        torch._foreach_add_(self.params, grads, alpha=scale.item())

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_(self.params, self.old_params)
        self.base_optimizer.step()

    @torch.no_grad()
    def micro_batch_step(self, closures: Sequence[Closure]) -> None:
        if not self.mean_grads:
            self.mean_grads = [torch.empty_like(p, requires_grad=False) for p in self.params]
        for j, closure in enumerate(closures, 1):
            closure()
            self._ascend(save=j == 1)
            closure()
            grads = [p.grad for p in self.params]
            if j == 1:
                torch._foreach_copy_(self.mean_grads, grads)
            else:
                torch._foreach_lerp_(self.mean_grads, grads, 1 / j)
            torch._foreach_copy_(self.params, self.old_params)
        for p, mean_grad in zip(self.params, self.mean_grads, strict=True):
            p.grad = mean_grad
        self.base_optimizer.step()


def _make(implementation: str, params: Sequence[torch.nn.Parameter], base: Base) -> Stepper:
    return LeanSAM(params, base.optimizer(params, **base.kwargs, **fused_or_foreach(implementation)), RHO)


PROVIDERS = tuple(
    Provider(
        f"torch._foreach_/{implementation}",
        f"lean torch._foreach_ loop, {implementation} base",
        partial(_make, implementation),
        takes_micro_batches=True,
    )
    for implementation in ("foreach", "fused")
)
