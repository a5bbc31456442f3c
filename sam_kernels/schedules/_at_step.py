"""λ and ρ as numbers, tensors, strings or functions of the step t = 1, 2, …; ρ also as a :class:`Radius`.

Sources: Unified SAM (arXiv 2503.02225) for λ_t, almost constant radii (arXiv 2401.08060) for ρ_k = C/k^p.

t is a number, or, where a CUDA graph must be able to go on counting, a () float64 tensor on the parameters' device. Of a tensor nothing is
read here that would wait for a device, and what is made of it is one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from sam_kernels._validate import check_number, check_number_or_tensor, describe
from sam_kernels.schedules._radius import AscentInfo, Radius

__all__ = [
    "FIRST_STEP",
    "RhoSchedule",
    "Schedule",
    "Step",
    "almost_constant",
    "beta_at",
    "check_schedule",
    "lambd_at",
    "radius_at",
    "radius_of_group",
    "rho_at",
    "takes_part",
]

Step = int | Tensor
FIRST_STEP = torch.ones((), dtype=torch.float64)
Schedule = float | Tensor | str | Callable[[Any], float | Tensor]
RhoSchedule = Schedule | Radius

_LAMBDS: dict[str, Callable[[Any], float | Tensor]] = {"1/t": lambda t: 1.0 / t, "1-1/t": lambda t: 1.0 - 1.0 / t}
_NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?"
_ALMOST_CONSTANT = re.compile(rf"\s*(?P<c>{_NUMBER})\s*/\s*k\s*\^\s*(?P<p>{_NUMBER})\s*")


def almost_constant(C: float, p: float, t: Step) -> float | Tensor:
    """C / t^p."""
    return cast("float | Tensor", C / t**p)


def lambd_at(value: Schedule, t: Step) -> float | Tensor:
    """λ_t in [0, 1]: a number, ``'1/t'`` (SAM → USAM), ``'1-1/t'`` (USAM → SAM) or a callable t → λ."""
    if isinstance(value, str):
        if value.replace(" ", "") not in _LAMBDS:
            raise ValueError(f"SAM: lambd must be a number, '1/t', '1-1/t' or a callable t -> lambda, got {value!r}")
        return _LAMBDS[value.replace(" ", "")](t)
    return _evaluated("lambd", value, t, low=0.0, high=1.0)


def rho_at(value: Schedule, t: Step) -> float | Tensor:
    """ρ_t ≥ 0: a number, ``'C/k^p'`` such as ``'0.1/k^0.001'`` (k is the step) or a callable t → ρ."""
    if isinstance(value, str):
        match = _ALMOST_CONSTANT.fullmatch(value)
        if match is None:
            raise ValueError(f"SAM: rho must be a number, 'C/k^p' (such as '0.1/k^0.001') or a callable t -> rho, got {value!r}")
        return almost_constant(float(match["c"]), float(match["p"]), t)
    return _evaluated("rho", value, t, low=0.0)


def beta_at(value: Schedule, t: Step) -> float | Tensor:
    """β_t ≥ 0, RW-SAM's inverse temperature: a number or a callable t → β."""
    if isinstance(value, str):
        raise TypeError(f"SAM: beta must be a number, a tensor or a callable t -> beta, got {value!r}")
    return _evaluated("beta", value, t, low=0.0)


def radius_of_group(group: Mapping[str, Any], *, norm: Tensor, grad_scale: Tensor | None, loss: Any) -> float | Tensor:
    """ρ_t of a group whose turn it is to ascend.

    Args:
        norm: () of the gradients as they are.
        grad_scale: () what their loss was multiplied by.
        loss: what the closure returned, whatever it was.
    """
    rho, t = group["rho"], group["sam_step"]
    if not isinstance(rho, Radius):
        return rho_at(rho, t)
    if isinstance(loss, Tensor):
        loss = loss.detach().reshape(()) if loss.numel() == 1 else None
    elif isinstance(loss, bool) or not isinstance(loss, int | float):
        loss = None
    return radius_at(rho, AscentInfo(t, group, norm if grad_scale is None else norm / grad_scale.to(norm.device), loss))


def radius_at(rho: RhoSchedule, info: AscentInfo) -> float | Tensor:
    """As :func:`rho_at`, with all that a :class:`Radius` wants to know."""
    if not isinstance(rho, Radius):
        return rho_at(rho, info.t)
    value, name = rho.radius(info), f"{type(rho).__name__}.radius"
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


def takes_part(rho: RhoSchedule, t: Step) -> bool:
    """Whether a group ascends: ρ_t > 0. Where t is a tensor only a number says no; anything else may change while nobody here looks."""
    if isinstance(t, Tensor) and not isinstance(rho, int | float):
        return True
    if isinstance(rho, Radius):
        return rho.takes_part(cast(int, t))
    return bool(rho_at(rho, t) > 0)


def check_schedule(name: str, value: Any, t: Step) -> None:
    """``value`` is usable as ``rho``, ``lambd`` or ``beta``; a callable is tried at t, the first step. Raises TypeError or ValueError."""
    if name == "rho" and isinstance(value, Radius):
        return
    if isinstance(value, bool) or not (isinstance(value, int | float | str | Tensor) or callable(value)):
        raise TypeError(f"SAM: {name} must be a number, a tensor, a string or a callable, got {describe(value)}")
    {"rho": rho_at, "lambd": lambd_at, "beta": beta_at}[name](cast(Schedule, value), t)


def _evaluated(name: str, value: Any, t: Step, *, low: float, high: float | None = None) -> float | Tensor:
    if not callable(value):
        check = check_number_or_tensor if isinstance(t, Tensor) else check_number
        return check("SAM", name, value, low=low, high=high)
    result = value(t)
    if not isinstance(t, Tensor):
        return check_number("SAM", f"{name}({t})", result, low=low, high=high)
    if not isinstance(result, Tensor):
        raise TypeError(
            f"SAM: with capturable=True {name} is called with the step t as a tensor and must make a tensor of it, got {describe(result)}"
        )
    return check_number_or_tensor("SAM", f"{name}(t)", result, low=low, high=high)
