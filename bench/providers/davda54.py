"""The published davda54/sam loop (MIT, github.com/davda54/sam), written anew, operation for operation; and m-SAM made of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.providers.base import RHO, Base, Closure, Provider, Stepper, fused_or_foreach

__all__ = ["PROVIDERS", "PublishedSAM"]


class PublishedSAM(torch.optim.Optimizer):
    def __init__(
        self, params: Any, base_optimizer: type[torch.optim.Optimizer], rho: float = 0.05, adaptive: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)
        self._mean_grads: list[Tensor] = []

    @torch.no_grad()
    def first_step(self) -> None:
        grad_norm = self._grad_norm()
        for group in self.param_groups:
            scale = group["rho"] / (grad_norm + 1e-12)
            for p in group["params"]:
                if p.grad is None:
                    continue
                self.state[p]["old_p"] = p.data.clone()
                e_w = (torch.pow(p, 2) if group["adaptive"] else 1.0) * p.grad * scale.to(p)
                p.add_(e_w)

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()

    @torch.no_grad()
    def micro_batch_step(self, closures: Sequence[Closure]) -> None:
        """The steps as above, around an accumulator that is kept: the gradients themselves are gone with the next backward pass."""
        params = [p for group in self.param_groups for p in group["params"]]
        if not self._mean_grads:
            self._mean_grads = [torch.empty_like(p, requires_grad=False) for p in params]
        for mean_grad in self._mean_grads:
            mean_grad.zero_()
        for closure in closures:
            closure()
            self.first_step()
            closure()
            for p, mean_grad in zip(params, self._mean_grads, strict=True):
                mean_grad.add_(p.grad, alpha=1 / len(closures))
                p.data = self.state[p]["old_p"]
        for p, mean_grad in zip(params, self._mean_grads, strict=True):
            p.grad = mean_grad
        self.base_optimizer.step()

    def _grad_norm(self) -> Tensor:
        shared_device = self.param_groups[0]["params"][0].device
        norms = [
            ((torch.abs(p) if group["adaptive"] else 1.0) * p.grad).norm(p=2).to(shared_device)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        return torch.norm(torch.stack(norms), p=2)


def _make(implementation: str, params: Sequence[torch.nn.Parameter], base: Base) -> Stepper:
    return PublishedSAM(params, base.optimizer, rho=RHO, **base.kwargs, **fused_or_foreach(implementation))


PROVIDERS = tuple(
    Provider(f"davda54/{implementation}", f"davda54 loop, {implementation} base", partial(_make, implementation), takes_micro_batches=True)
    for implementation in ("foreach", "fused")
)
