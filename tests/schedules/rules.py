"""Radii and mixes of every kind, made anew each time, and a problem to train with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels.schedules import (
    AlmostConstantRadius,
    AscentInfo,
    DecreasingRadius,
    Interval,
    InverseNorm,
    LinearLambda,
    LinearRadius,
    LRProportional,
    Radius,
    Tail,
)
from tests.optim.problem import closure_of, make_batch


@dataclass(frozen=True)
class LossOverNorm(Radius):
    """A user's own, as Polyak's step: ρ = min{ρ_max, loss / (10 ‖g‖)}, in tensors. (Here the maximum is met in some steps.)"""

    rho_max: float

    def radius(self, info: AscentInfo) -> Tensor:
        return (0.1 * info.loss / info.norm).clamp(max=self.rho_max)


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "almost constant": lambda: {"rho": AlmostConstantRadius(0.1, 0.5)},
    "decreasing": lambda: {"rho": DecreasingRadius(0.2)},
    "linear radius": lambda: {"rho": LinearRadius(0.0, 0.3, 4)},
    "linear lambda": lambda: {"rho": 0.1, "lambd": LinearLambda(1.0, 0.0, 3)},
    "interval of a number": lambda: {"rho": Interval(0.1, 3, start=1)},
    "late interval": lambda: {"rho": Interval(0.1, 2, start=3)},
    "interval of a warm-up": lambda: {"rho": Interval(LinearRadius(0.0, 0.4, 4), 2)},
    "tail of an interval of a number": lambda: {"rho": Tail(Interval(0.1, 3), 2)},
    "interval of a string": lambda: {"rho": Interval("0.1/k^0.5", 2)},
    "interval of a rule": lambda: {"rho": Interval(DecreasingRadius(0.2), 2)},
    "interval of a radius": lambda: {"rho": Interval(LossOverNorm(0.2), 2)},
    "tail": lambda: {"rho": Tail(0.1, 3)},
    "tail of an interval": lambda: {"rho": Tail(Interval(LRProportional(0.2, 0.05, 0.1, 0.0), 2), 2)},
    "proportional to lr": lambda: {"rho": LRProportional(0.2, 0.05, 0.1, 0.02)},
    "inverse of the norm": lambda: {"rho": Tail(InverseNorm(0.05, 0.2), 1), "lambd": 0.7},
    "a user's own": lambda: {"rho": LossOverNorm(0.2), "lambd": 0.5},
}
# ρ_t, λ_t of steps 1, 2, … that need nothing but t.
BY_HAND: dict[str, list[tuple[float, float]]] = {
    "almost constant": [(0.1 / math.sqrt(t), 1.0) for t in range(1, 8)],
    "decreasing": [(rho, 1.0) for rho in (0.2, 0.2, 0.2, 1 / 7, 1 / 9, 1 / 11, 1 / 13)],
    "linear radius": [(rho, 1.0) for rho in (0.0, 0.075, 0.15, 0.225, 0.3, 0.3, 0.3)],
    "linear lambda": [(0.1, lambd) for lambd in (1.0, 2 / 3, 1 / 3, 0.0, 0.0, 0.0, 0.0)],
    "interval of a number": [(rho, 1.0) for rho in (0.0, 0.1, 0.0, 0.0, 0.1, 0.0, 0.0)],
    "late interval": [(rho, 1.0) for rho in (0.0, 0.0, 0.0, 0.1, 0.0, 0.1, 0.0)],
    "interval of a warm-up": [(rho, 1.0) for rho in (0.0, 0.0, 0.2, 0.0, 0.4, 0.0, 0.4)],
    "tail of an interval of a number": [(rho, 1.0) for rho in (0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.1)],
    "interval of a string": [(rho, 1.0) for rho in (0.1, 0.0, 0.1 / math.sqrt(3), 0.0, 0.1 / math.sqrt(5), 0.0, 0.1 / math.sqrt(7))],
    "interval of a rule": [(rho, 1.0) for rho in (0.2, 0.0, 0.2, 0.0, 1 / 9, 0.0, 1 / 13)],
    "tail": [(rho, 1.0) for rho in (0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1)],
}


def make(model: nn.Module, options: dict[str, Any], *, capturable: bool = False, lr: float = 0.1) -> tuple[Any, Any]:
    """The optimizer and a scheduler of its learning rate."""
    rate = torch.tensor(lr, dtype=torch.float64) if capturable else lr
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=rate, momentum=0.9, capturable=capturable, **options)
    return optimizer, sam_kernels.schedules.Diminish2(optimizer)


def train(model: nn.Module, optimizer: Any, scheduler: Any, steps: range) -> list[int]:
    """How often each step called the closure."""
    calls = []
    for k in steps:
        closure, seen = closure_of(optimizer, model, make_batch(next(model.parameters()).dtype, seed=k)), [0]

        def counted(closure: Callable[[], Tensor] = closure, seen: list[int] = seen) -> Tensor:
            seen[0] += 1
            return closure()

        optimizer.step(counted)
        scheduler.step()
        calls.append(seen[0])
    return calls
