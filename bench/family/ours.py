"""The members of the family on each backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sam_kernels
from bench.family.options import ALPHA, KAPPA, LMBDA, LOOK_ALPHA, LOOK_EVERY, SIGMA, THETA
from bench.providers.base import RHO, Base, Provider, Stepper
from bench.providers.ours import BACKENDS, OnBackend
from sam_kernels._dispatch import reason_missing

__all__ = ["FRIENDLY", "GSAM", "LOOKSAM", "VASSO", "WSAM"]

Params = Sequence[torch.nn.Parameter]


class FromGivenGrads:
    """LookSAM takes closures: one that puts in place what the two-step API would have been given."""

    def __init__(self, optimizer: sam_kernels.LookSAM, params: Params, every: int) -> None:
        self.optimizer = optimizer
        self.params = list(params)
        self.every = every
        self.steps = 0
        self._first: list[Tensor | None] = []

    def first_step(self) -> None:
        self._first = [param.grad for param in self.params]

    def second_step(self) -> None:
        second = [param.grad for param in self.params]
        waiting = [self._first, second] if self.steps % self.every == 0 else [second]

        def closure() -> None:
            for param, grad in zip(self.params, waiting.pop(0), strict=True):
                param.grad = grad

        self.optimizer.step(closure)
        self.steps += 1


def _make(optimizer: Callable[..., Any], options: dict[str, Any], backend: str, params: Params, base: Base) -> Stepper:
    return OnBackend(optimizer(params, base.optimizer, rho=RHO, **options, **base.kwargs), backend)


def _looksam(*args: Any, **kwargs: Any) -> FromGivenGrads:
    return FromGivenGrads(sam_kernels.LookSAM(*args, **kwargs), args[0], kwargs["k"])


def _providers(optimizer: Callable[..., Any], options: dict[str, Any], *, writes_grads: bool = False) -> tuple[Provider, ...]:
    return tuple(
        Provider(
            f"sam_kernels/{backend}",
            f"sam_kernels, {backend}",
            partial(_make, optimizer, options, backend),
            partial(lambda name, n_tensors: reason_missing(name), backend),
            writes_grads=writes_grads,
        )
        for backend in BACKENDS
    )


VASSO = _providers(sam_kernels.VaSSO, {"theta": THETA})
FRIENDLY = _providers(sam_kernels.FriendlySAM, {"sigma": SIGMA, "lmbda": LMBDA})
GSAM = _providers(sam_kernels.GSAM, {"alpha": ALPHA}, writes_grads=True)
WSAM = _providers(sam_kernels.WSAM, {"kappa": KAPPA})
LOOKSAM = _providers(_looksam, {"k": LOOK_EVERY, "alpha": LOOK_ALPHA}, writes_grads=True)
