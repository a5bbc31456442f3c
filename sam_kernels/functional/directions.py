"""Directions of ascent made of the gradient and a moving average of earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from sam_kernels import _validate
from sam_kernels._flags import report_norm
from sam_kernels._grouping import split
from sam_kernels.functional._common import Tensors, TensorsOrNone, check_amp, check_with_gaps, first_and_later, on, pick
from sam_kernels.functional._flat import EMA
from sam_kernels.functional._library import operation
from sam_kernels.functional.norms import combine_norms

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


@operation(written=("ema", "found_inf"), fake=_fake_direction_norm, flat=EMA)
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
    op = "direction_norm_"
    _validate.check_choice(op, "kind", kind, DIRECTIONS)
    theta = _validate.check_number(op, "theta", theta, low=0.0, high=1.0, open_low=True)
    sigma = _validate.check_number(op, "sigma", sigma)
    lmbda = _validate.check_number(op, "lmbda", lmbda, low=0.0, high=1.0, open_low=True)
    eta = _validate.check_number(op, "eta", eta, low=0.0)
    _validate.check_flag(op, "adaptive", adaptive)
    if adaptive and params is None:
        raise ValueError(f"{op}: adaptive=True needs params")
    check_amp(op, grad_scale, found_inf)
    lists: dict[str, Tensors | None] = {"grads": grads, "params": params if adaptive else None}
    check_with_gaps(op, lists, "ema", ema, written=("ema",))
    norms = []
    for first_step, indices in first_and_later(ema):
        fresh = [torch.zeros_like(grads[i]) for i in indices or ()] if first_step else None
        part = {name: pick(tensors, indices) for name, tensors in lists.items()}
        part["ema"] = fresh if fresh is not None else pick(cast(Tensors, ema), indices)
        for rows in split(part, written=("ema",)):
            norms.append(
                rows.backend.direction_norm_(
                    rows.lists["grads"],
                    rows.lists["ema"],
                    rows.lists["params"],
                    kind=kind,
                    first_step=first_step,
                    theta=theta,
                    sigma=sigma,
                    lmbda=lmbda,
                    adaptive=adaptive,
                    eta=eta,
                    grad_scale=None if grad_scale is None else on(grad_scale, grads[rows.indices[0]].device),
                )
            )
            rows.finish()
        if fresh is not None:
            for i, average in zip(indices or (), fresh, strict=True):
                cast("list[Tensor | None]", ema)[i] = average
    dtype = torch.float64 if torch.float64 in {grad.dtype for grad in grads} else torch.float32
    result = combine_norms(norms).to(dtype) if norms else torch.zeros((), dtype=torch.float32, device="cpu")
    return report_norm(result, found_inf, None, None)
