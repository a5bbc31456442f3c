"""λ and ρ as numbers, tensors, strings or functions of the step t = 1, 2, …; ρ also as a :class:`Radius`.

Sources: Unified SAM (arXiv 2503.02225) for λ_t, almost constant radii (arXiv 2401.08060) for ρ_k = C/k^p.

t is a number, or, where a CUDA graph must be able to go on counting, a () float64 tensor on the parameters' device. Of a tensor nothing is
read here that would wait for a device, and what is made of it is one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from sam_kernels._validate import check_number, check_number_or_tensor, describe, plain_number
from sam_kernels.schedules._radius import AscentInfo, Radius

__all__ = [
    "FIRST_STEP",
    "RhoSchedule",
    "Schedule",
    "Step",
    "almost_constant",
    "beta_at",
    "check_schedule",
    "is_ascending",
    "lambd_at",
    "loss_for_radius",
    "power_law",
    "radius_at",
    "resolved_at",
    "rho_at",
]

Step = int | Tensor
FIRST_STEP = torch.ones((), dtype=torch.float64, device="cpu")
Schedule = float | Tensor | str | Callable[[Any], float | Tensor]
RhoSchedule = Schedule | Radius

_LAMBDS: dict[str, Callable[[Any], float | Tensor]] = {"1/t": lambda t: 1.0 / t, "1-1/t": lambda t: 1.0 - 1.0 / t}
_NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?"
_ALMOST_CONSTANT = re.compile(rf"\s*(?P<c>{_NUMBER})\s*/\s*k\s*\^\s*(?P<p>{_NUMBER})\s*")


def _number_in(value: Schedule) -> Schedule:
    """The number that a string holds, as the authors' package of Unified SAM takes it; anything else as it is."""
    return float(value) if isinstance(value, str) and re.fullmatch(rf"\s*[+-]?(?:{_NUMBER})\s*", value) else value


def power_law(text: str) -> tuple[float, float] | None:
    """(C, p) of ``'C/k^p'``, (C, 0) of a number; None for any other text."""
    number = _number_in(text)
    if isinstance(number, float):
        return number, 0.0
    match = _ALMOST_CONSTANT.fullmatch(text)
    return None if match is None else (float(match["c"]), float(match["p"]))


def almost_constant(C: float, p: float, t: Step) -> float | Tensor:
    """C / t^p."""
    return cast("float | Tensor", C / t**p)


def lambd_at(value: Schedule, t: Step) -> float | Tensor:
    """λ_t in [0, 1]: a number (``'0.5'`` is one), ``'1/t'`` (SAM → USAM), ``'1-1/t'`` (USAM → SAM) or a callable t → λ."""
    value = _number_in(value)
    if isinstance(value, str):
        if value.replace(" ", "") not in _LAMBDS:
            raise ValueError(f"SAM: lambd must be a number, '1/t', '1-1/t' or a callable t -> lambda, got {value!r}")
        return _LAMBDS[value.replace(" ", "")](t)
    return _evaluated("lambd", value, t, low=0.0, high=1.0)


def rho_at(value: Schedule, t: Step) -> float | Tensor:
    """ρ_t ≥ 0: a number (``'0.05'`` is one), ``'C/k^p'`` such as ``'0.1/k^0.001'`` (k is the step) or a callable t → ρ."""
    value = _number_in(value)
    if isinstance(value, str):
        law = power_law(value)
        if law is None:
            raise ValueError(f"SAM: rho must be a number, 'C/k^p' (such as '0.1/k^0.001') or a callable t -> rho, got {value!r}")
        return almost_constant(*law, t)
    return _evaluated("rho", value, t, low=0.0)


def beta_at(value: Schedule, t: Step) -> float | Tensor:
    """β_t, RW-SAM's inverse temperature: a number or a callable t → β."""
    if isinstance(value, str):
        raise TypeError(f"SAM: beta must be a number, a tensor or a callable t -> beta, got {value!r}")
    return _evaluated("beta", value, t)


def resolved_at(rho: RhoSchedule, t: Step) -> float | Tensor | Radius:
    """ρ_t, or the :class:`Radius` that is to be asked for it once the gradient's norm is known; 0 where a radius rests in step t.

    The only place that asks a schedule for its value at a step: a plan calls it once a step and group.
    """
    if not isinstance(rho, Radius):
        return rho_at(rho, t)
    return rho if isinstance(t, Tensor) else rho.at_step(t)


def is_ascending(rho: float | Tensor | Radius) -> bool:
    """Whether a group with this result of :func:`resolved_at` takes part in the ascent. A tensor and a ``Radius`` do."""
    return not isinstance(rho, int | float) or rho > 0


def radius_at(rho: RhoSchedule, info: AscentInfo) -> float | Tensor:
    """ρ_t out of a result of :func:`resolved_at`, or of a schedule inside a ``Radius``."""
    if not isinstance(rho, Radius):
        return rho_at(rho, info.t)
    value, name = plain_number(rho.radius(info)), f"{type(rho).__name__}.radius"
    # A norm that is not finite skips the step; a radius made of it would be refused before that.
    if isinstance(value, Tensor):
        if value.device == info.norm.device:
            value = value.masked_fill(~info.norm.isfinite(), 0.0)
        return check_number_or_tensor("SAM", name, value, low=0.0)
    if isinstance(info.t, Tensor):
        raise TypeError(f"SAM: with capturable=True {name} must make a tensor, of others such as lr, got {describe(value)}")
    if isinstance(value, float) and not math.isfinite(value) and not info.norm.isfinite():
        return 0.0
    return check_number("SAM", name, value, low=0.0)


def loss_for_radius(loss: Any) -> float | Tensor | None:  # ()
    """What a closure returned, as :class:`AscentInfo` has it: None where it is no number."""
    if isinstance(loss, Tensor):
        return loss.detach().reshape(()) if loss.numel() == 1 else None
    return None if isinstance(loss, bool) or not isinstance(loss, int | float) else loss


def check_schedule(name: str, value: Any, t: Step) -> None:
    """``value`` is usable as ``rho``, ``lambd`` or ``beta``; a callable is tried at t, the first step. Raises TypeError or ValueError."""
    if name == "rho" and isinstance(value, Radius):
        return
    value = plain_number(value)
    if isinstance(value, bool) or not (isinstance(value, int | float | str | Tensor) or callable(value)):
        raise TypeError(f"SAM: {name} must be a number, a tensor, a string or a callable, got {describe(value)}")
    {"rho": rho_at, "lambd": lambd_at, "beta": beta_at}[name](cast(Schedule, value), t)


def _evaluated(name: str, value: Any, t: Step, *, low: float | None = None, high: float | None = None) -> float | Tensor:
    if not callable(value):
        value = plain_number(value)
        check = check_number_or_tensor if isinstance(t, Tensor) else check_number
        return check("SAM", name, value, low=low, high=high)
    result = plain_number(value(t))
    if not isinstance(t, Tensor):
        return check_number("SAM", f"{name}({t})", result, low=low, high=high)
    if not isinstance(result, Tensor):
        raise TypeError(
            f"SAM: with capturable=True {name} is called with the step t as a tensor and must make a tensor of it, got {describe(result)}"
        )
    return check_number_or_tensor("SAM", f"{name}(t)", result, low=low, high=high)
