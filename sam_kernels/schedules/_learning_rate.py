r"""Learning rates under which SAM is proved to converge, as schedulers of PyTorch.

Sources: Fundamental Convergence Analysis of SAM (arXiv 2401.08060) asks for Σ t_k = ∞ and t_k ↓ 0 (without convexity; and Σ t_k ρ_k < ∞) or
Σ t_k² < ∞ (with it); the rules are those of its experiments. Unified SAM (arXiv 2503.02225) for μ-PL functions.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sam_kernels._validate import check_count, check_number

__all__ = ["Constant", "Diminish1", "Diminish2", "Diminish3", "PLDecreasing"]


class _Factors(LRScheduler):
    """lr_e = lr_0 · factor(e).

    Each :meth:`step` multiplies what the learning rate is by factor(e) / factor(e - 1), so that another scheduler may multiply it too.
    """

    def _factor(self, epoch: int, initial_lr: float | Tensor) -> float | Tensor:
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        """The next learning rate of each group, for :meth:`step`."""
        if not self._get_lr_called_within_step:
            warnings.warn("get_lr is one step ahead: get_last_lr() is what the learning rates are", UserWarning, stacklevel=2)
        # In the constructor, with last_epoch=: the rate that a checkpoint has left in the optimizer is the right one already.
        if self.last_epoch > 0 and self._step_count == 1:
            return [_copy(group["lr"]) for group in self.optimizer.param_groups]
        return [group["lr"] * self._ratio(group) for group in self.optimizer.param_groups]

    def _ratio(self, group: dict[str, Any]) -> float | Tensor:
        initial_lr = group.setdefault("initial_lr", _copy(group["lr"]))  # a group added since has none
        factor = self._factor(self.last_epoch, initial_lr)
        return factor / self._factor(self.last_epoch - 1, initial_lr) if self.last_epoch > 0 else factor

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        return [initial_lr * self._factor(self.last_epoch, initial_lr) for initial_lr in self.base_lrs]


class Constant(_Factors):
    """lr_e = lr_0: the rule that others are compared with. With a constant ρ too, SAM does not converge (arXiv 2401.08060)."""

    def _factor(self, epoch: int, initial_lr: float | Tensor) -> float:
        return 1.0


class Diminish1(_Factors):
    """lr_e = lr_0 / (e + 1), e = 0, 1, … the calls of :meth:`step`, usually epochs. arXiv 2401.08060, "Diminish 1".

    Usable on SAM and on any optimizer of PyTorch, with ``lr`` a number or a tensor (which is filled), beside, before or after other
    schedulers, as those of PyTorch.

    Args:
        optimizer: whose ``lr`` is scheduled; each group has its own lr_0.
        last_epoch: e to start after, as for any scheduler of PyTorch: -1 for a new run.

    Raises:
        TypeError: for what is no optimizer. KeyError: for ``last_epoch`` ≥ 0 where groups have no ``initial_lr``.
    """

    def _factor(self, epoch: int, initial_lr: float | Tensor) -> float:
        return 1 / (epoch + 1)


class Diminish2(_Factors):
    """lr_0 at e = 0, then lr_e = lr_0 / e^exponent. arXiv 2401.08060, "Diminish 2"; everything else as :class:`Diminish1`.

    Args:
        exponent: > 0. More than 1/2 makes Σ lr² finite, no more than 1 leaves Σ lr infinite.

    Raises:
        TypeError, ValueError: for an exponent that is no such number.
    """

    def __init__(self, optimizer: Optimizer, *, exponent: float = 0.5001, last_epoch: int = -1) -> None:
        self.exponent = check_number("Diminish2", "exponent", exponent, low=0.0, open_low=True)
        super().__init__(optimizer, last_epoch)

    def _factor(self, epoch: int, initial_lr: float | Tensor) -> float:
        return float(max(epoch, 1) ** -self.exponent)


class Diminish3(_Factors):
    """lr_0 at e = 0, then lr_e = lr_0 / (m ln m), m = first + ⌊(e - 1) / period⌋. arXiv 2401.08060, "Diminish 3"; everything else as
    :class:`Diminish1`.

    Args:
        first: m at e = 1, ≥ 2 (1 ln 1 is 0).
        period: epochs at the same learning rate, ≥ 1.

    Raises:
        TypeError, ValueError: for what is no such integer.
    """

    def __init__(self, optimizer: Optimizer, *, first: int = 3, period: int = 5, last_epoch: int = -1) -> None:
        self.first = check_count("Diminish3", "first", first, low=2)
        self.period = check_count("Diminish3", "period", period, low=1)
        super().__init__(optimizer, last_epoch)

    def _factor(self, epoch: int, initial_lr: float | Tensor) -> float:
        if epoch == 0:
            return 1.0
        m = self.first + (epoch - 1) // self.period
        return 1 / (m * math.log(m))


class PLDecreasing(_Factors):
    """lr_t = min{lr_0, (2 t + 1) / ((t + 1)² μ)}: with :class:`DecreasingRadius` SAM converges to the minimum of a μ-PL function.

    Call :meth:`step` after every step of the optimizer: t = 0, 1, … counts those. lr_0 is the γ of
    :func:`sam_kernels.theory.pl_constant_steps`, or less; :func:`~sam_kernels.theory.pl_decreasing_steps` gives the same numbers.
    arXiv 2503.02225, section 3; everything else as :class:`Diminish1`.

    Args:
        mu: μ > 0.

    Raises:
        TypeError, ValueError: for what is no such number.
    """

    def __init__(self, optimizer: Optimizer, mu: float, *, last_epoch: int = -1) -> None:
        self.mu = check_number("PLDecreasing", "mu", mu, low=0.0, open_low=True)
        super().__init__(optimizer, last_epoch)

    def _factor(self, epoch: int, initial_lr: float | Tensor) -> float | Tensor:
        limit = (2 * epoch + 1) / ((epoch + 1) ** 2 * self.mu)
        # min{lr, limit} / lr, without a division by an lr of 0.
        return limit / (initial_lr.clamp(min=limit) if isinstance(initial_lr, Tensor) else max(initial_lr, limit))


def _copy(lr: float | Tensor) -> float | Tensor:
    return lr.clone() if isinstance(lr, Tensor) else lr
