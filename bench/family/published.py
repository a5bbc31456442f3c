"""VaSSO and F-SAM as their authors published them (BingcongLi/VaSSO, nblt/F-SAM), written anew, operation for operation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.family.options import LMBDA, SIGMA, THETA
from bench.providers.base import RHO, Base, Provider, Stepper, fused_or_foreach
from bench.providers.davda54 import PublishedSAM

__all__ = ["FRIENDLY", "VASSO", "PublishedFriendlySAM", "PublishedVaSSO"]


class PublishedVaSSO:
    """The perturbation is kept and taken off again: no copy of the weights."""

    def __init__(self, params: Sequence[torch.nn.Parameter], base_optimizer: torch.optim.Optimizer, rho: float, theta: float) -> None:
        self.params = list(params)
        self.base_optimizer = base_optimizer
        self.state: dict[Tensor, dict[str, Tensor]] = {p: {} for p in self.params}
        self.rho = rho
        self.theta = theta

    @torch.no_grad()
    def first_step(self) -> None:
        for p in self.params:
            if p.grad is None:
                continue
            if "ema" not in self.state[p]:
                self.state[p]["ema"] = p.grad.clone().detach()
            else:
                self.state[p]["ema"].mul_(1 - self.theta)
                self.state[p]["ema"].add_(p.grad, alpha=self.theta)
        norms = [self.state[p]["ema"].norm(p=2) for p in self.params if p.grad is not None]
        scale = self.rho / (torch.norm(torch.stack(norms), p=2) + 1e-7)
        for p in self.params:
            if p.grad is None:
                continue
            e_w = self.state[p]["ema"] * scale
            p.add_(e_w)
            self.state[p]["e_w"] = e_w

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.params:
            if p.grad is None:
                continue
            p.sub_(self.state[p]["e_w"])
        self.base_optimizer.step()


class PublishedFriendlySAM(PublishedSAM):
    """The direction takes the gradient's place, and then the loop of SAM."""

    def __init__(self, params: Any, base_optimizer: type[torch.optim.Optimizer], *, sigma: float, lmbda: float, **kwargs: Any) -> None:
        super().__init__(params, base_optimizer, **kwargs)
        self.sigma = sigma
        self.lmbda = lmbda

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad.clone()
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = grad
                else:
                    p.grad -= self.state[p]["momentum"] * self.sigma
                    self.state[p]["momentum"] = self.state[p]["momentum"] * self.lmbda + grad * (1 - self.lmbda)
        super().first_step()


def _vasso(implementation: str, params: Sequence[torch.nn.Parameter], base: Base) -> Stepper:
    return PublishedVaSSO(params, base.optimizer(params, **base.kwargs, **fused_or_foreach(implementation)), RHO, THETA)


def _friendly(implementation: str, params: Sequence[torch.nn.Parameter], base: Base) -> Stepper:
    options = {**base.kwargs, **fused_or_foreach(implementation)}
    return PublishedFriendlySAM(params, base.optimizer, rho=RHO, sigma=SIGMA, lmbda=LMBDA, **options)


VASSO = tuple(
    Provider(f"published/{implementation}", f"authors' loop, {implementation} base", partial(_vasso, implementation))
    for implementation in ("foreach", "fused")
)
FRIENDLY = tuple(
    Provider(f"published/{implementation}", f"authors' loop, {implementation} base", partial(_friendly, implementation), writes_grads=True)
    for implementation in ("foreach", "fused")
)
