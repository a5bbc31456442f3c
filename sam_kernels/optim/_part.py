"""What directions and descent rules have in common, and the questions that an optimizer asks of them."""

from __future__ import annotations

from enum import Enum
from typing import ClassVar

from torch.optim import Optimizer

__all__ = ["FirstGradient", "Part", "Use"]


class FirstGradient(Enum):
    """Where the first pass takes its gradient."""

    AT_WEIGHTS = "at the weights"
    ELSEWHERE = "elsewhere"  # where Direction.begin has moved the weights
    NONE = "none"  # the ascent comes before the only forward pass


class Use(Enum):
    """What an optimizer may be asked for beside ``step(closure)``."""

    CAPTURE = "capturable=True"  # nothing may be decided, or drawn, by the host at a step
    CLIPPING = "max_grad_norm"
    BACKWARD = "backward(closure)"  # all that is done must be done to the gradients of one batch
    FREEZING = "freeze_unperturbed=True"  # the first pass gives no gradients to groups with rho = 0
    TWO_STEPS = "first_step() and second_step()"  # every step must have two passes


class Part:
    """A direction or a descent rule. Parts hold options alone and may be shared by optimizers."""

    role: ClassVar[str]  # "direction" or "descent"
    name: ClassVar[str]  # in checkpoints and error messages
    keeps: ClassVar[tuple[str, ...]] = ()  # names of what is kept for each parameter between steps

    def check_base(self, base: Optimizer) -> None:
        """Raises ValueError for a base optimizer, or options of it, for which the part is not defined."""

    def refuses(self, use: Use) -> bool:
        """Whether the part is not defined for ``use``."""
        return False
