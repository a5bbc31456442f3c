"""``sam_kernels.SAM`` on each of its backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

import sam_kernels
from bench.providers.base import RHO, Base, Closure, Provider, Stepper
from sam_kernels._dispatch import reason_missing

__all__ = ["PROVIDERS", "REFERENCE"]

REFERENCE = "sam_kernels/native"  # the one whose speed-ups are reported

BACKENDS = ("native", "foreach")


class OnBackend:
    """Runs an optimizer's steps on one backend, though others are used in the same process."""

    def __init__(self, optimizer: sam_kernels.SAM, backend: str) -> None:
        self.optimizer = optimizer
        self.backend = backend

    def first_step(self) -> None:
        with sam_kernels.use_backend(self.backend):
            self.optimizer.first_step()

    def second_step(self) -> None:
        with sam_kernels.use_backend(self.backend):
            self.optimizer.second_step()

    def micro_batch_step(self, closures: Sequence[Closure]) -> None:
        with sam_kernels.use_backend(self.backend):
            self.optimizer.step(list(closures))


def _make(backend: str, params: Sequence[torch.nn.Parameter], base: Base) -> Stepper:
    return OnBackend(sam_kernels.SAM(params, base.optimizer, rho=RHO, **base.kwargs), backend)


def _missing(backend: str) -> Callable[[int], str | None]:
    return lambda n_tensors: reason_missing(backend)


PROVIDERS = tuple(
    Provider(
        f"sam_kernels/{backend}",
        f"sam_kernels, {backend}",
        partial(_make, backend),
        _missing(backend),
        takes_micro_batches=True,
    )
    for backend in BACKENDS
)
