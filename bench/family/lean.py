"""The best one can do with ``torch._foreach_`` alone: averages and backups kept between steps, no temporaries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from bench.family.options import LMBDA, SIGMA, THETA
from bench.providers.base import RHO, Base, Provider, Stepper, fused_or_foreach

__all__ = ["FRIENDLY", "VASSO", "LeanFriendlySAM", "LeanVaSSO"]


class LeanVaSSO:
    def __init__(self, params: Sequence[torch.nn.Parameter], base_optimizer: torch.optim.Optimizer) -> None:
        self.params = list(params)
        self.base_optimizer = base_optimizer
        self.old_params = [torch.empty_like(p, requires_grad=False) for p in self.params]
        self.averages = [torch.empty_like(p, requires_grad=False) for p in self.params]
        self.has_stepped = False

    @torch.no_grad()
    def first_step(self) -> None:
        grads = [p.grad for p in self.params if p.grad is not None]
        if self.has_stepped:
            torch._foreach_lerp_(self.averages, grads, THETA)
        else:
            torch._foreach_copy_(self.averages, grads)
        self._ascend(self.averages)

    def _ascend(self, directions: list[torch.Tensor]) -> None:
        norms = torch._foreach_norm(directions, 2, dtype=torch.float32)
        scale = RHO / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-12)
        torch._foreach_copy_(self.old_params, self.params)
        torch._foreach_add_(self.params, directions, alpha=scale.item())
        self.has_stepped = True

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_(self.params, self.old_params)
        self.base_optimizer.step()


class LeanFriendlySAM(LeanVaSSO):
    """d = g - m takes the gradient's place, so that no third list is needed, and with sigma = 1 the average moves by (1 - lmbda) d."""

    @torch.no_grad()
    def first_step(self) -> None:
        grads = [p.grad for p in self.params if p.grad is not None]
        if self.has_stepped:
            torch._foreach_sub_(grads, self.averages)
            torch._foreach_add_(self.averages, grads, alpha=1.0 - LMBDA)
        else:
            torch._foreach_copy_(self.averages, grads)
        self._ascend(grads)


assert SIGMA == 1.0


def _make(optimizer: type[LeanVaSSO], implementation: str, params: Sequence[torch.nn.Parameter], base: Base) -> Stepper:
    return optimizer(params, base.optimizer(params, **base.kwargs, **fused_or_foreach(implementation)))


def _providers(optimizer: type[LeanVaSSO], *, writes_grads: bool) -> tuple[Provider, ...]:
    return tuple(
        Provider(
            f"torch._foreach_/{implementation}",
            f"lean torch._foreach_ loop, {implementation} base",
            partial(_make, optimizer, implementation),
            writes_grads=writes_grads,
        )
        for implementation in ("foreach", "fused")
    )


VASSO = _providers(LeanVaSSO, writes_grads=False)
FRIENDLY = _providers(LeanFriendlySAM, writes_grads=True)
