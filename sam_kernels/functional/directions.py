"""Directions of ascent made of the gradient and a moving average of earlier ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from sam_kernels import _validate
from sam_kernels._flags import report_norm
from sam_kernels._grouping import run
from sam_kernels.functional._common import Tensors, TensorsOrNone, check_amp, check_with_gaps, first_and_later, pick
from sam_kernels.functional._flat import EMA
from sam_kernels.functional._library import operation
from sam_kernels.functional.norms import combine_norms
from sam_kernels.operations import DirectionNorm

__all__ = ["DIRECTIONS", "direction_norm_"]

DIRECTIONS = ("vasso", "friendly")


def _fake_direction_norm(*, grads: Tensors, first_steps: Sequence[int], **_: Any) -> Tensor:
    """First steps are made first: the norm is on the device of the first of these."""
    dtype = torch.float64 if any(grad.dtype is torch.float64 for grad in grads) else torch.float32
    return (
        grads[first_steps[0] if first_steps else 0].new_empty((), dtype=dtype)
        if grads
        else torch.zeros((), dtype=torch.float32, device="cpu")
    )


@operation(written=(*DirectionNorm.written, "found_inf"), fake=_fake_direction_norm, flat=EMA)
def direction_norm_(
    grads: Tensors,  # n tensors
    ema: TensorsOrNone,  # n tensors
    params: Tensors | None = None,  # n tensors
    *,
    kind: str,
    theta: float = 0.9,
    sigma: float = 1.0,
    lmbda: float = 0.6,
    adaptive: bool = False,
    eta: float = 0.0,
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # () float32
) -> Tensor:  # () float32, float64 where a gradient is float64
    """Updates the moving averages m = ``ema`` and returns the norm of the direction d, or of T_w d, T_w = |p| + eta, when ``adaptive``.

    "vasso" (VaSSO, arXiv 2309.15639): m <- (1 - theta) m + theta g, d = m.
    "friendly" (Friendly SAM, arXiv 2403.12350): d = g - sigma m, then m <- lmbda m + (1 - lmbda) g.
    ``theta`` and ``lmbda`` are in (0, 1]. An entry of ``ema`` that is None is a first step: d = m = g, and m is put into the list.
    ``grad_scale`` divides the gradients first: moving averages, direction and norm are those of the loss itself. The norm is that of d
    before m is rounded to storage, summed as in :func:`grad_norm`.
    Where an element of g is not finite its m is left as it is (0 on a first step), and the norm is not finite. ``found_inf`` is set to 1
    where the norm is not finite, and left alone otherwise.
    Reads g, m (and p); writes m: 3 N s bytes.
    """
    name = DirectionNorm.name
    _validate.check_choice(name, "kind", kind, DIRECTIONS)
    theta = _validate.check_number(name, "theta", theta, low=0.0, high=1.0, open_low=True)
    sigma = _validate.check_number(name, "sigma", sigma)
    lmbda = _validate.check_number(name, "lmbda", lmbda, low=0.0, high=1.0, open_low=True)
    eta = _validate.check_number(name, "eta", eta, low=0.0)
    _validate.check_flag(name, "adaptive", adaptive)
    if adaptive and params is None:
        raise ValueError(f"{name}: adaptive=True needs params")
    check_amp(name, grad_scale, found_inf)
    lists: dict[str, Tensors | None] = {"grads": grads, "params": params if adaptive else None}
    check_with_gaps(name, lists, "ema", ema, written=DirectionNorm.written)
    op = DirectionNorm(kind=kind, theta=theta, sigma=sigma, lmbda=lmbda, adaptive=adaptive, eta=eta, grad_scale=grad_scale)
    norms = []
    for is_first, indices in first_and_later(ema):
        part = {role: pick(tensors, indices) for role, tensors in lists.items()}
        fresh = [torch.zeros_like(grad) for grad in part["grads"] or ()] if is_first else None
        part["ema"] = fresh if fresh is not None else pick(cast(Tensors, ema), indices)
        norms += run(dataclasses.replace(op, first_step=is_first) if is_first else op, part)
        if fresh is not None:
            for i, average in zip(range(len(fresh)) if indices is None else indices, fresh, strict=True):
                cast("list[Tensor | None]", ema)[i] = average
    dtype = torch.float64 if torch.float64 in {grad.dtype for grad in grads} else torch.float32
    result = combine_norms(norms).to(dtype) if norms else torch.zeros((), dtype=torch.float32, device="cpu")
    return report_norm(result, found_inf, None, None)
