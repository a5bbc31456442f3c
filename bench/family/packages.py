"""The members of the family that pytorch_optimizer ships. All write their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from bench.family.options import ALPHA, KAPPA, LMBDA, LOOK_ALPHA, LOOK_EVERY, SIGMA
from bench.providers.base import RHO, Base, Provider, Stepper, fused_or_foreach
from bench.providers.packages import unless_installed

__all__ = ["FRIENDLY", "GSAM", "LOOKSAM", "WSAM"]

Params = Sequence[torch.nn.Parameter]


class GSAMSteps:
    """What its ``step(closure)`` does around the two passes."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def first_step(self) -> None:
        self.optimizer.perturb_weights(rho=self.optimizer.rho_t)

    def second_step(self) -> None:
        self.optimizer.gradient_decompose(self.optimizer.alpha)
        self.optimizer.un_perturb()
        self.optimizer.base_optimizer.step()


def _gsam(implementation: str, params: Params, base: Base) -> Stepper:
    from pytorch_optimizer import GSAM

    wrapped = base.optimizer(params, **base.kwargs, **fused_or_foreach(implementation))
    radius = SimpleNamespace(step=lambda: RHO)
    foreach = True if implementation == "foreach" else None
    return GSAMSteps(GSAM(params, wrapped, torch.nn.Identity(), radius, alpha=ALPHA, foreach=foreach))


def _wsam(implementation: str, params: Params, base: Base) -> Stepper:
    from pytorch_optimizer import WSAM

    options = {**base.kwargs, **fused_or_foreach(implementation)}
    optimizer: Stepper = WSAM(torch.nn.Identity(), params, base.optimizer, rho=RHO, gamma=KAPPA, **options)
    return optimizer


def _friendly(implementation: str, params: Params, base: Base) -> Stepper:
    from pytorch_optimizer import FriendlySAM

    options = {**base.kwargs, **fused_or_foreach(implementation)}
    optimizer: Stepper = FriendlySAM(params, base.optimizer, rho=RHO, sigma=SIGMA, lmbda=LMBDA, **options)
    return optimizer


def _looksam(implementation: str, params: Params, base: Base) -> Stepper:
    from pytorch_optimizer import LookSAM

    options = {**base.kwargs, **fused_or_foreach(implementation)}
    optimizer: Stepper = LookSAM(params, base.optimizer, rho=RHO, k=LOOK_EVERY, alpha=LOOK_ALPHA, **options)
    return optimizer


def _providers(make: Callable[[str, Params, Base], Stepper], note: str = "") -> tuple[Provider, ...]:
    titles = {"foreach": "pytorch_optimizer, foreach=True", "fused": "pytorch_optimizer, fused base"}
    return tuple(
        Provider(
            f"pytorch_optimizer/{implementation}",
            title,
            partial(make, implementation),
            unless_installed("pytorch_optimizer"),
            note=note,
            writes_grads=True,
        )
        for implementation, title in titles.items()
    )


FRIENDLY, GSAM, WSAM = _providers(_friendly), _providers(_gsam), _providers(_wsam)
LOOKSAM = _providers(_looksam, note="projects and scales each tensor by norms of its own, where the paper has those of all")
