"""λ and ρ as numbers, strings or functions of the step t = 1, 2, …

Sources: Unified SAM (arXiv 2503.02225) for λ_t, almost constant radii (arXiv 2401.08060) for ρ_k = C/k^p.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

from sam_kernels._validate import check_number, describe

__all__ = ["Schedule", "check_schedule", "lambd_at", "rho_at"]

Schedule = float | str | Callable[[int], float]

_LAMBDS: dict[str, Callable[[int], float]] = {"1/t": lambda t: 1.0 / t, "1-1/t": lambda t: 1.0 - 1.0 / t}
_NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?"
_DECREASING_RADIUS = re.compile(rf"\s*(?P<c>{_NUMBER})\s*/\s*k\s*\^\s*(?P<p>{_NUMBER})\s*")


def lambd_at(value: Schedule, t: int) -> float:
    """λ_t in [0, 1]: a number, ``'1/t'`` (SAM → USAM), ``'1-1/t'`` (USAM → SAM) or a callable t → λ."""
    if isinstance(value, str):
        if value.replace(" ", "") not in _LAMBDS:
            raise ValueError(f"SAM: lambd must be a number, '1/t', '1-1/t' or a callable t -> lambda, got {value!r}")
        return _LAMBDS[value.replace(" ", "")](t)
    return check_number("SAM", "lambd" if not callable(value) else f"lambd({t})", _evaluate(value, t), low=0.0, high=1.0)


def rho_at(value: Schedule, t: int) -> float:
    """ρ_t ≥ 0: a number, ``'C/k^p'`` such as ``'0.1/k^0.001'`` (k is the step) or a callable t → ρ."""
    if isinstance(value, str):
        match = _DECREASING_RADIUS.fullmatch(value)
        if match is None:
            raise ValueError(f"SAM: rho must be a number, 'C/k^p' (such as '0.1/k^0.001') or a callable t -> rho, got {value!r}")
        return float(match["c"]) / float(t ** float(match["p"]))
    return check_number("SAM", "rho" if not callable(value) else f"rho({t})", _evaluate(value, t), low=0.0)


def check_schedule(name: str, value: Any) -> None:
    """``value`` is usable as ``rho`` or ``lambd``; a callable is tried at t = 1. Raises TypeError or ValueError."""
    if isinstance(value, bool) or not (isinstance(value, int | float | str) or callable(value) or hasattr(value, "item")):
        raise TypeError(f"SAM: {name} must be a number, a string or a callable, got {describe(value)}")
    (lambd_at if name == "lambd" else rho_at)(cast(Schedule, value), 1)


def _evaluate(value: Schedule, t: int) -> Any:
    return value(t) if callable(value) else value
