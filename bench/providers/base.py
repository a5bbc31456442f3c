"""What a provider of a whole step is: a name, and a function that makes its optimizer for given parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

__all__ = ["BASES", "RHO", "Base", "Closure", "MicroBatchStepper", "Provider", "Stepper", "fused_or_foreach"]

RHO = 0.05

Closure = Callable[[], object]


@dataclass(frozen=True)
class Base:
    """The wrapped optimizer and its options, the same for all providers."""

    name: str
    title: str
    optimizer: type[torch.optim.Optimizer]
    kwargs: dict[str, Any]
    state_keys: tuple[str, ...]


BASES = {
    "sgd": Base("sgd", "SGD-momentum", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, ("momentum_buffer",)),
    "adamw": Base(
        "adamw",
        "AdamW",
        torch.optim.AdamW,
        {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1},
        ("exp_avg", "exp_avg_sq", "step"),
    ),
}


class Stepper(Protocol):
    """An optimizer with the usual two-step API. Gradients are in place and stay."""

    def first_step(self) -> object: ...

    def second_step(self) -> object: ...


class MicroBatchStepper(Stepper, Protocol):
    """One that takes steps of m-SAM too. Each closure puts a gradient in place, once for the ascent and once for the descent."""

    def micro_batch_step(self, closures: Sequence[Closure]) -> object: ...


@dataclass(frozen=True)
class Provider:
    """``missing`` tells why it cannot run a workload of so many tensors here, or None. ``takes_micro_batches``: a MicroBatchStepper.
    ``writes_grads``: the gradients are not what they were after a step, so that it needs gradients of its own."""

    name: str
    title: str
    make: Callable[[Sequence[torch.nn.Parameter], Base], Stepper]
    missing: Callable[[int], str | None] = lambda n_tensors: None
    note: str = ""
    takes_micro_batches: bool = False
    writes_grads: bool = False


def fused_or_foreach(implementation: str) -> dict[str, bool]:
    """The option that makes torch's base optimizer use one of its two fast implementations."""
    return {implementation: True}
