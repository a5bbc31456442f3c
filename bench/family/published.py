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
    """Moving averages in place, then a new tensor for each perturbation, which is kept to take it off again: no copy of the weights."""

    def __init__(self, params: Sequence[torch.nn.Parameter], base_optimizer: torch.optim.Optimizer, rho: float, theta: float) -> None:
        self.params = list(params)
        self.base_optimizer = base_optimizer
        self.rho, self.theta = rho, theta
        self.averages: dict[Tensor, Tensor] = {}
        self.moves: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def first_step(self) -> None:
        present = [param for param in self.params if param.grad is not None]
        for param in present:
            average = self.averages.get(param)
            if average is None:
                self.averages[param] = param.grad.clone()
            else:
                average.mul_(1 - self.theta).add_(param.grad, alpha=self.theta)
        norm = torch.norm(torch.stack([self.averages[param].norm(p=2) for param in present]), p=2)
        for param in present:
            self.moves[param] = self.averages[param] * (self.rho / (norm + 1e-7))
            param.add_(self.moves[param])

    @torch.no_grad()
    def second_step(self) -> None:
        for param in self.params:
            if param.grad is not None:
                param.sub_(self.moves[param])
        self.base_optimizer.step()


class PublishedFriendlySAM(PublishedSAM):
    """The direction takes the gradient's place, out of new tensors, and then comes the loop of SAM."""

    def __init__(self, params: Any, base_optimizer: type[torch.optim.Optimizer], *, sigma: float, lmbda: float, **kwargs: Any) -> None:
        super().__init__(params, base_optimizer, **kwargs)
        self.sigma, self.lmbda = sigma, lmbda
        self.averages: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def first_step(self) -> None:
        for param in (param for group in self.param_groups for param in group["params"] if param.grad is not None):
            given, average = param.grad.clone(), self.averages.get(param)
            self.averages[param] = given
            if average is not None:
                param.grad.sub_(average * self.sigma)
                self.averages[param] = average * self.lmbda + given * (1 - self.lmbda)
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
