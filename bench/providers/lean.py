"""The best one can do with ``torch._foreach_`` alone: backups kept between steps, no temporaries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from bench.providers.base import RHO, Base, Provider, Stepper, fused_or_foreach

__all__ = ["PROVIDERS", "LeanSAM"]


class LeanSAM:
    def __init__(self, params: Sequence[torch.nn.Parameter], base_optimizer: torch.optim.Optimizer, rho: float) -> None:
        self.params = list(params)
        self.base_optimizer = base_optimizer
        self.old_params = [torch.empty_like(p, requires_grad=False) for p in self.params]
        self.rho = rho

    @torch.no_grad()
    def first_step(self) -> None:
        grads = [p.grad for p in self.params if p.grad is not None]
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
        scale = self.rho / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-12)
        torch._foreach_copy_(self.old_params, self.params)
        torch._foreach_add_(self.params, grads, alpha=scale.item())

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_(self.params, self.old_params)
        self.base_optimizer.step()


def _make(implementation: str, params: Sequence[torch.nn.Parameter], base: Base) -> Stepper:
    return LeanSAM(params, base.optimizer(params, **base.kwargs, **fused_or_foreach(implementation)), RHO)


PROVIDERS = tuple(
    Provider(
        f"torch._foreach_/{implementation}",
        f"lean torch._foreach_ loop, {implementation} base",
        partial(_make, implementation),
        is_python_loop=False,
    )
    for implementation in ("foreach", "fused")
)
