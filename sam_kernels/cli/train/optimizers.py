"""The optimizers ``train`` compares, by name, with the radius each uses unless ``--rho`` says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import sam_kernels
from sam_kernels.cli.train.family import FAMILY

__all__ = ["BASES", "BY_DEFAULT", "NORMS", "SHARPNESS_AWARE", "Settings", "build", "kind_of", "options_of"]


@dataclass(frozen=True)
class Base:
    build: type[torch.optim.Optimizer]
    lr: float
    weight_decay: float
    options: dict[str, Any]


BASES = {
    "sgd": Base(torch.optim.SGD, lr=0.05, weight_decay=5e-4, options={"momentum": 0.9}),
    "adamw": Base(torch.optim.AdamW, lr=2e-3, weight_decay=1e-2, options={}),
}

# The radius of each. They do not compare: SAM moves by rho whatever the gradient, USAM by rho times the gradient's norm.
# Chosen with seed 0 and --base sgd between 0.1 and 1, for clean and for 40 % noisy labels together, on held-out training images; those of
# msam and rwsam, which move by rho too, are SAM's.
SHARPNESS_AWARE: dict[str, float] = {
    **{"sam": 0.3, "usam": 0.5, "unified": 0.5, "msam": 0.3, "rwsam": 0.3},
    **{name: member.rho for name, member in FAMILY.items()},
}
BY_DEFAULT = ("sam", "usam", "unified")  # two passes over the whole batch each: what takes longer is asked for
NORMS = ("exact", "finite_difference", "jvp", "last_layer", "norm_layers")


@dataclass(frozen=True)
class Settings:
    base: str
    lr: float
    weight_decay: float
    rho: float | None  # None: each optimizer's own
    lambd: float | str
    micro_batch_size: int = 16  # of msam
    # Of rwsam, as what follows. Of 0.03, 0.1 and 0.3 the best on held-out training images, with 40 % noisy and with clean labels (batches
    # of 128, 3 seeds). Norms are between 2 and 40 here: with a large beta the ascent follows a few samples, the wrong labels, alone.
    beta: float = 0.03
    norms: str = "exact"
    micro_batch: int = 1
    num_directions: int = 1


def kind_of(name: str) -> str:
    """``msam:8`` is a kind of msam."""
    return name.partition(":")[0]


def options_of(name: str, settings: Settings) -> dict[str, Any]:
    """What ``name`` is run with beyond the base's options. A number behind a colon takes the place of msam's m, of rwsam's beta, of what
    else the family's table says."""
    kind, _, number = name.partition(":")
    if kind not in SHARPNESS_AWARE:
        return {}
    options: dict[str, Any] = {"rho": SHARPNESS_AWARE[kind] if settings.rho is None else settings.rho}
    if kind == "unified":
        options["lambd"] = settings.lambd
    if kind == "msam":
        options["micro_batch_size"] = int(number or settings.micro_batch_size)
    if kind == "rwsam":
        options |= {"beta": float(number or settings.beta), "norms": settings.norms, "micro_batch": settings.micro_batch}
        if settings.norms in ("finite_difference", "jvp"):
            options["num_directions"] = settings.num_directions
    if kind in FAMILY and (key := FAMILY[kind].option) is not None:
        default = FAMILY[kind].default
        options[key] = type(default)(number) if number else default  # type: ignore[misc]  # a number where there is an option
    return options


def build(name: str, model: nn.Module, settings: Settings, seed: int) -> torch.optim.Optimizer:
    """``seed`` is of random directions and moves, where there are any."""
    kind, base = kind_of(name), BASES[settings.base]
    base_options = {"lr": settings.lr, "weight_decay": settings.weight_decay, **base.options}
    options = options_of(name, settings)
    if kind in BASES:
        return base.build(model.parameters(), **base_options)
    if kind == "rwsam":
        return sam_kernels.RWSAM(model, base.build, seed=seed, **options, **base_options)
    if kind in FAMILY:
        member = FAMILY[kind]
        seeds = {"seed": seed} if member.takes_seed else {}
        return member.make(model.parameters(), base.build, model=model, **options, **seeds, **base_options)
    options.pop("micro_batch_size", None)  # of the step, not of the optimizer
    presets: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sam": sam_kernels.SAM,
        "msam": sam_kernels.SAM,
        "usam": sam_kernels.USAM,
        "unified": sam_kernels.UnifiedSAM,
    }
    return presets[kind](model.parameters(), base.build, model=model, **options, **base_options)
