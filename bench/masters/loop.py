"""The usual loop in mixed precision: the published davda54/sam loop on a 16-bit model, its base optimizer on float32 masters."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from bench.providers import RHO, Base
from bench.providers.davda54 import PublishedSAM

__all__ = ["IMPLEMENTATIONS", "MastersLoop"]

IMPLEMENTATIONS = ("for-loop", "foreach", "fused")  # of torch's optimizers


class OnMasters(Optimizer):
    """Copies gradients to float32 masters, takes the inner optimizer's step on them, and copies them back."""

    def __init__(self, params: Any, inner: type[Optimizer], **kwargs: Any) -> None:
        super().__init__(params, {})
        self._params = [p for group in self.param_groups for p in group["params"]]
        self._masters = [p.detach().to(torch.float32) for p in self._params]
        for master in self._masters:
            master.grad = torch.empty_like(master)
        self.inner = inner(self._masters, **kwargs)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p, master in zip(self._params, self._masters, strict=True):
            master.grad.copy_(p.grad)  # type: ignore[union-attr]  # made above
        self.inner.step()
        for p, master in zip(self._params, self._masters, strict=True):
            p.copy_(master)


class MastersLoop:
    """The loop with one set of weights and state, whose steps can be made by each of torch's implementations."""

    def __init__(self, params: Any, base: Base) -> None:
        self.optimizer = PublishedSAM(params, partial(OnMasters, inner=base.optimizer), rho=RHO, **base.kwargs)  # type: ignore[arg-type]  # a class is expected

    def step(self, implementation: str) -> None:
        on_masters: Any = self.optimizer.base_optimizer
        for group in on_masters.inner.param_groups:
            group.update(foreach=implementation == "foreach", fused=implementation == "fused")
        self.optimizer.first_step()
        self.optimizer.second_step()
