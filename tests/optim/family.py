"""Every member of the family with settings that are nobody's defaults, for the library and for its transcription."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels import functional
from sam_kernels.optim._seeds import derived_seed
from tests.optim.problem import loss_of
from tests.optim.transcriptions import TRANSCRIPTIONS, Transcription

__all__ = ["ADAM", "BASES", "CLOSURES_ONLY", "MEMBERS", "ONE_PASS", "SGD", "Member"]

SGD = "sgd-momentum", "sgd-nesterov", "sgd-maximize"
ADAM = "adam", "adamw", "adamw-amsgrad"
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "sgd-nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "sgd-maximize": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.5, "maximize": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "adamw-amsgrad": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    "rmsprop": (partial(torch.optim.RMSprop, alpha=0.99), {"lr": 0.01}),  # members have an alpha of their own
    "sps": (torch.optim.SGD, {}),
    "sps-momentum": (torch.optim.SGD, {"momentum": 0.6}),
}
SIGMA, SEED = 0.05, 7


def drawn(t: int, params: list[Tensor]) -> list[Tensor]:
    """Δ of RSAM at step t, of its only group."""
    delta = [torch.zeros_like(param) for param in params]
    seed = derived_seed(SEED, t, 0, 0)
    functional.random_perturb_(delta, [torch.empty_like(param) for param in delta], seed=seed, scale=SIGMA, distribution="normal")
    return delta


@dataclass(frozen=True)
class Member:
    """``options`` are both's; ``ours`` the library's alone, ``theirs`` the transcription's."""

    options: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    bases: tuple[str, ...] = ("sgd", *SGD, *ADAM, "rmsprop")
    name: str = ""
    rho: float = 0.05

    def make(self, params: Any, base: Any, **kwargs: Any) -> Any:
        return getattr(sam_kernels, self.name)(params, base, **{"rho": self.rho, **self.options, **self.ours, **kwargs})

    def transcribe(self, model: nn.Module, base: Any, loss: Callable[[nn.Module, Any], Tensor] = loss_of, **kwargs: Any) -> Transcription:
        return TRANSCRIPTIONS[self.name](model, base, loss, **{"rho": self.rho, **self.options, **self.theirs, **kwargs})


def _member(name: str, options: dict[str, Any] | None = None, **fields: Any) -> Member:
    return Member(options or {}, name=name, **fields)


MEMBERS = {
    "SAM": _member("SAM"),
    "VaSSO": _member("VaSSO", {"theta": 0.3}),
    "FriendlySAM": _member("FriendlySAM", {"sigma": 0.7, "lmbda": 0.5}),
    "Extragradient": _member("Extragradient", theirs={"lambd": 0.0}, rho=0.2),
    "GCSAM": _member("GCSAM"),
    "RSAM": _member("RSAM", {"c": 0.8}, ours={"sigma": SIGMA, "seed": SEED}, theirs={"draw": drawn}),
    "GSAM": _member("GSAM", {"alpha": 0.6}),
    "CRSAM": _member("CRSAM", {"gamma": 0.3, "beta": 0.05}),
    "WSAM-coupled": _member("WSAM", {"kappa": 0.7, "decoupled": False}),
    "WSAM-decoupled": _member("WSAM", {"kappa": 0.7, "decoupled": True}),
    "LookSAM": _member("LookSAM", {"k": 3, "alpha": 0.4}),
    "MomentumSAM": _member("MomentumSAM", rho=0.1, bases=(*SGD, "adam", "adamw")),
    "S2SAM": _member("S2SAM", rho=0.1),
    "SAMSPS": _member("SAMSPS", {"f_star": 0.1, "gamma_b": 0.85}, ours={"weight_decay": 0.1}, bases=("sps", "sps-momentum"), rho=0.1),
}
ONE_PASS = ("MomentumSAM", "S2SAM")  # a step: the ascent comes first
CLOSURES_ONLY = ("CRSAM", "LookSAM")  # steps of another number of passes than two
