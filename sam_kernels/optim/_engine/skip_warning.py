"""Warnings where one step after another is skipped, or has no ascent: a run that no longer trains as it should must say so."""

from __future__ import annotations

import torch
from torch import Tensor

from sam_kernels.optim._engine.capturable import is_recording
from sam_kernels.optim._engine.warn import warn_user

__all__ = ["SkipWatch", "warn_of_plain_steps"]

_IN_A_ROW = 25


class SkipWatch:
    """Counts skipped steps in a row and warns once, naming the pass whose gradient was not finite.

    On the CPU ``found_inf`` is read after every step. Of a device it is copied every 25 steps, and the copy is read 25 steps later, when it
    has long arrived: nobody waits.
    """

    def __init__(self) -> None:
        self._in_a_row = 0
        self._in_first_pass = False
        self._is_said = False
        self._steps = 0
        self._copies: list[Tensor] = []  # of (skipped, found_inf after the ascent), each 25 steps apart

    def after_ascent(self, found_inf: Tensor) -> None:  # ()
        """Notes whether it was the first pass, where the count is about to be full."""
        if self._is_said:
            return
        if _is_at_hand(found_inf):
            if self._in_a_row >= _IN_A_ROW - 1:
                self._in_first_pass = _is_set(found_inf)
        elif not is_recording(found_inf.device) and (self._steps + 1) % _IN_A_ROW == 0:
            self._ascent = found_inf.clone()

    def after_step(self, found_inf: Tensor, skipped: Tensor) -> None:  # (), ()
        """``skipped`` counts earlier steps than this one."""
        if self._is_said:
            return
        if _is_at_hand(found_inf):
            self._in_a_row = self._in_a_row + 1 if _is_set(found_inf) else 0
            if self._in_a_row >= _IN_A_ROW:
                self._say(self._in_first_pass)
        elif not is_recording(found_inf.device):
            self._steps += 1
            if self._steps % _IN_A_ROW == 0:
                ascent = getattr(self, "_ascent", torch.zeros_like(found_inf))
                now = torch.stack([(skipped + found_inf).float(), ascent.float()])
                self._copies = [*self._copies[-2:], now.to("cpu", non_blocking=True)]
                if len(self._copies) == 3:  # the newest one may not have arrived
                    (before, _), (after, in_first_pass) = self._copies[0].tolist(), self._copies[1].tolist()
                    if after - before >= _IN_A_ROW:
                        self._say(in_first_pass != 0)

    def _say(self, in_first_pass: bool) -> None:
        self._is_said = True
        which = "first pass, at the weights" if in_first_pass else "second pass, at the perturbed weights"
        warn_user(
            f"SAM: {_IN_A_ROW} steps in a row were skipped; the gradient of the {which}, is not finite, so the weights no longer change"
        )


def _is_at_hand(flag: Tensor) -> bool:
    """Whether reading it waits for nobody."""
    return flag.is_cpu


def _is_set(flag: Tensor) -> bool:
    return type(flag) is Tensor and flag.item() != 0.0  # not of a fake tensor


def warn_of_plain_steps(kind: str, base: str, *, is_first: bool) -> None:
    """A first step, or two steps in a row, had no ascent, where a radius is positive."""
    steps = "a first step" if is_first else "two steps"
    warn_user(
        f"{kind}: {steps} without an ascent: step() alone is a step of {base}. For sharpness-aware steps call step(closure), or first_step "
        "and second_step, or optimizer.backward(closure) in the place of loss.backward(). In a trainer that calls step() itself use "
        "sam_kernels.integrations (transformers.SAMTrainer, accelerate.Accelerator, lightning.SAMCallback). With rho=0 there is no warning"
    )
