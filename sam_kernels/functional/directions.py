"""Directions of ascent made of the gradient and a moving average of earlier ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sam_kernels import _validate
from sam_kernels._flags import report_norm
from sam_kernels._grouping import run
from sam_kernels._tensor_list import arithmetic_dtype
from sam_kernels.functional._common import Tensors, TensorsOrNone, by_first_step, check_with_gaps, checked, params_if
from sam_kernels.functional._flat import EMA
from sam_kernels.functional._library import operation
from sam_kernels.functional._results import joined, norm_like
from sam_kernels.operations import DirectionNorm

__all__ = ["DIRECTIONS", "direction_norm_"]

DIRECTIONS = ("vasso", "friendly")


def _fake_direction_norm(*, grads: Tensors, first_steps: Sequence[int], **_: Any) -> Tensor:
    """First steps are made first: the norm is on the device of the first of these."""
    return norm_like([*(grads[i] for i in first_steps), *grads])


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
    op = checked(DirectionNorm(kind=kind, theta=theta, sigma=sigma, lmbda=lmbda, adaptive=adaptive, eta=eta, grad_scale=grad_scale))
    if found_inf is not None:
        _validate.check_scalar_tensor(name, "found_inf", found_inf)
    lists: dict[str, Tensors | None] = {"grads": grads, "params": params_if(op.adaptive, op.name, params)}
    check_with_gaps(DirectionNorm, lists, "ema", ema)
    norms: list[Tensor] = []
    for rows in by_first_step(lists, "ema", ema, like="grads"):
        norms += run(dataclasses.replace(op, first_step=True) if rows.is_first else op, rows.lists)
        if rows.is_first:
            rows.put_back("ema", ema)
    return report_norm(joined(norms).to(arithmetic_dtype(grads)), found_inf)
