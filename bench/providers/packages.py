"""SAM as two packages on PyPI ship it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial

import torch

from bench.providers.base import RHO, Base, Provider, Stepper, fused_or_foreach

__all__ = ["PROVIDERS", "unless_installed"]


def unless_installed(module: str) -> Callable[[int], str | None]:
    reason = None if importlib.util.find_spec(module) else f"{module} is not installed (pip install {module})"
    return lambda n_tensors: reason


def _pytorch_optimizer(implementation: str, params: Sequence[torch.nn.Parameter], base: Base) -> Stepper:
    from pytorch_optimizer import SAM

    return SAM(params, base.optimizer, rho=RHO, **base.kwargs, **fused_or_foreach(implementation))


def _unifiedsam(implementation: str, params: Sequence[torch.nn.Parameter], base: Base) -> Stepper:
    from unifiedsam import unifiedSAM

    return unifiedSAM(params, base.optimizer, rho=RHO, lambd=1.0, **base.kwargs, **fused_or_foreach(implementation))


PROVIDERS = (
    Provider(
        "pytorch_optimizer/foreach",
        "pytorch_optimizer, foreach=True",
        partial(_pytorch_optimizer, "foreach"),
        unless_installed("pytorch_optimizer"),
        note="foreach=True reaches both its own passes (float32 only) and the base",
    ),
    Provider(
        "pytorch_optimizer/fused",
        "pytorch_optimizer, fused base",
        partial(_pytorch_optimizer, "fused"),
        unless_installed("pytorch_optimizer"),
        note="with a fused base it loops over the parameters: its foreach=True would reach the base as well, which refuses both",
    ),
    *(
        Provider(
            f"unifiedsam/{implementation}",
            f"unifiedsam, {implementation} base",
            partial(_unifiedsam, implementation),
            unless_installed("unifiedsam"),
        )
        for implementation in ("foreach", "fused")
    ),
)
