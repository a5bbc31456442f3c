"""The named members of the family among ``train``'s optimizers: what each is made of, and its radius unless ``--rho`` says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import torch

import sam_kernels

__all__ = ["FAMILY", "NUMBERED", "Member"]


@dataclass(frozen=True)
class Member:
    """``option``: what a number behind a colon of the name sets, ``default`` otherwise."""

    make: Callable[..., torch.optim.Optimizer]
    rho: float
    option: str | None = None
    default: float | None = None
    number: click.ParamType[Any] | None = None
    takes_seed: bool = False
    bases: tuple[str, ...] = ("sgd", "adamw")


def _polyak(params: Any, base: Any, *, lr: float, **options: Any) -> torch.optim.Optimizer:
    """Its step size is found; what the schedule of learning rates multiplies is the bound of it, the package's 1 at first."""
    return sam_kernels.SAMSPS(params, base, gamma_b=1.0, **options)


# What moves by rho whatever the gradient has SAM's radius here; the others that of their authors' code, but for extragradient: the
# textbook's extrapolation is as long as the step, and 0.05 is SGD's learning rate.
FAMILY = {
    "asam": Member(sam_kernels.ASAM, 0.5),
    "vasso": Member(sam_kernels.VaSSO, 0.3, "theta", 0.9, click.FloatRange(0, 1, min_open=True)),
    "fsam": Member(sam_kernels.FriendlySAM, 0.3),
    "rsam": Member(sam_kernels.RSAM, 0.3, takes_seed=True),
    "gcsam": Member(sam_kernels.GCSAM, 0.3),
    "gsam": Member(sam_kernels.GSAM, 0.3, "alpha", 0.4, click.FloatRange(0)),
    "wsam": Member(sam_kernels.WSAM, 0.3, "kappa", 0.9, click.FloatRange(0, 1, max_open=True)),
    "looksam": Member(sam_kernels.LookSAM, 0.3, "k", 5, click.IntRange(min=1)),
    "momentum-sam": Member(sam_kernels.MomentumSAM, 0.3),
    "extragradient": Member(sam_kernels.Extragradient, 0.05),
    "sam-sps": Member(_polyak, 0.1, bases=("sgd",)),
}
NUMBERED = [f"{name}:{member.option.upper()}" for name, member in FAMILY.items() if member.option is not None]  # for the help text
