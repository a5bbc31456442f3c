"""The optimizers that ``train`` compares: what each is made of, and its radius unless ``--rho`` says otherwise.

Torch is imported when an optimizer is made: ``train --help`` reads the names, and needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

import sam_kernels

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "BASES", "BETA_SCALES", "BY_DEFAULT", "MEMBERS", "NORMS", "NUMBERED", "PEER", "Settings", "build", "kind_of", "options_of",
]  # fmt: skip


@dataclass(frozen=True)
class Base:
    name: str  # in torch.optim
    lr: float
    weight_decay: float
    options: dict[str, Any]

    @property
    def build(self) -> type[torch.optim.Optimizer]:
        """The class."""
        import torch

        found: type[torch.optim.Optimizer] = getattr(torch.optim, self.name)
        return found


BASES = {
    "sgd": Base("SGD", lr=0.05, weight_decay=5e-4, options={"momentum": 0.9}),
    "adamw": Base("AdamW", lr=2e-3, weight_decay=1e-2, options={}),
}

BY_DEFAULT = ("sam", "usam", "unified")  # two passes over the whole batch each: what takes longer is asked for
BETA_SCALES = ("none", "std")
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
    beta_scale: str = "none"
    norm_cap: float | None = None
    norms: str = "exact"
    micro_batch: int = 1
    num_directions: int = 1
    momentum: float | None = None  # of SGD; None: the base's own


@dataclass(frozen=True)
class Member:
    """A sharpness-aware optimizer. A number behind a colon of its name sets ``option``."""

    make: Callable[..., torch.optim.Optimizer]
    rho: float
    option: str | None = None
    default: float | None = None  # of the option; None: the setting of its name
    number: click.ParamType[Any] | None = None  # of the option
    settings: tuple[str, ...] = ()  # other options, which are the settings of their names
    takes_seed: bool = False
    bases: tuple[str, ...] = ("sgd", "adamw")


def _named(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Return a function that makes the optimizer which the package has by this name."""

    def make(*args: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = getattr(sam_kernels, name)(*args, **options)
        return optimizer

    return make


def _micro_batched(params: Any, base: Any, *, micro_batch_size: int, **options: Any) -> torch.optim.Optimizer:
    """The size of the micro-batches is an argument of the step."""
    return sam_kernels.SAM(params, base, **options)


def _reweighted(params: Any, base: Any, *, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """It takes the parameters of the model."""
    return sam_kernels.RWSAM(model, base, **options)


def _polyak(params: Any, base: Any, *, lr: float, **options: Any) -> torch.optim.Optimizer:
    """Its step size is found; what the schedule of learning rates multiplies is the bound of it, the package's 1 at first."""
    return sam_kernels.SAMSPS(params, base, gamma_b=1.0, **options)


# Radii do not compare: SAM moves by rho whatever the gradient, USAM by rho times the gradient's norm. Those of sam, usam and unified were
# chosen with seed 0 and --base sgd between 0.1 and 1, for clean and for 40 % noisy labels together, on held-out training images. Others
# that move by rho whatever the gradient have SAM's, the rest that of their authors' code, but for extragradient: the textbook's
# extrapolation is as long as the step, and 0.05 is SGD's learning rate.
MEMBERS = {
    "sam": Member(_named("SAM"), 0.3),
    "usam": Member(_named("USAM"), 0.5),
    "unified": Member(_named("UnifiedSAM"), 0.5, settings=("lambd",)),
    "msam": Member(_micro_batched, 0.3, "micro_batch_size", number=click.IntRange(min=1)),
    "rwsam": Member(
        _reweighted,
        0.3,
        "beta",
        number=click.FLOAT,
        settings=("beta_scale", "norm_cap", "norms", "micro_batch", "num_directions"),
        takes_seed=True,
    ),
    "asam": Member(_named("ASAM"), 0.5),
    "vasso": Member(_named("VaSSO"), 0.3, "theta", 0.9, click.FloatRange(0, 1, min_open=True)),
    "fsam": Member(_named("FriendlySAM"), 0.3),
    "rsam": Member(_named("RSAM"), 0.3, takes_seed=True),
    "gcsam": Member(_named("GCSAM"), 0.3),
    "gsam": Member(_named("GSAM"), 0.3, "alpha", 0.4, click.FloatRange(0)),
    "wsam": Member(_named("WSAM"), 0.3, "kappa", 0.9, click.FloatRange(0, 1, max_open=True)),
    "looksam": Member(_named("LookSAM"), 0.3, "k", 5, click.IntRange(min=1)),
    "momentum-sam": Member(_named("MomentumSAM"), 0.3),
    "s2-sam": Member(_named("S2SAM"), 0.3),
    "extragradient": Member(_named("Extragradient"), 0.05),
    "sam-sps": Member(_polyak, 0.1, bases=("sgd",)),
}
PEER = "plain-sam"  # the loop of peer.py, with the options of sam
NUMBERED = [f"{name}:{member.option.upper()}" for name, member in MEMBERS.items() if member.option and member.default]  # for the help text


def kind_of(name: str) -> str:
    """``msam:8`` is a kind of msam."""
    return name.partition(":")[0]


def options_of(name: str, settings: Settings) -> dict[str, Any]:
    """Return the options of ``name`` beyond those of the base."""
    kind, _, number = ("sam" if name == PEER else name).partition(":")
    if kind not in MEMBERS:
        return {}
    member = MEMBERS[kind]
    options: dict[str, Any] = {"rho": member.rho if settings.rho is None else settings.rho}
    if member.option is not None:
        default = getattr(settings, member.option) if member.default is None else member.default
        options[member.option] = type(default)(number) if number else default
    options |= {key: getattr(settings, key) for key in member.settings}
    if options.get("norms", "jvp") not in ("finite_difference", "jvp"):
        del options["num_directions"]
    for key, default in (("beta_scale", "none"), ("norm_cap", None)):  # said only where it was asked for
        if key in options and options[key] == default:
            del options[key]
    return options


def build(name: str, model: nn.Module, settings: Settings, seed: int) -> torch.optim.Optimizer:
    """``seed`` is of random directions and moves, where there are any. Of the peer this is the base optimizer, fused where it can be."""
    from sam_kernels.cli.train.peer import has_fused_base

    kind, base = kind_of(name), BASES[settings.base]
    base_options = {"lr": settings.lr, "weight_decay": settings.weight_decay, **base.options}
    if settings.momentum is not None:
        base_options["momentum"] = settings.momentum
    if kind in BASES:
        return base.build(model.parameters(), **base_options)
    if kind == PEER:
        if has_fused_base(next(model.parameters()).device):
            base_options["fused"] = True
        return base.build(model.parameters(), **base_options)
    member = MEMBERS[kind]
    seeds = {"seed": seed} if member.takes_seed else {}
    return member.make(model.parameters(), base.build, model=model, **options_of(name, settings), **seeds, **base_options)
