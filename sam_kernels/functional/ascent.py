"""The ascent and the way back."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sam_kernels import _validate
from sam_kernels._grouping import run, split
from sam_kernels._tensor_list import TensorList
from sam_kernels.functional._common import Tensors, TensorsOrNone, by_first_step, check_lists, check_with_gaps, checked
from sam_kernels.functional._library import operation
from sam_kernels.functional._masters import check_backups, check_rounding
from sam_kernels.functional.directions import DIRECTIONS
from sam_kernels.operations import Number, Perturb, Restore

__all__ = ["perturb_", "restore_"]


@operation(written=Perturb.written, scheduled=("rounding_seed",))
def perturb_(
    params: Tensors,  # n tensors
    grads: Tensors,  # n tensors
    old_params: Tensors,  # n tensors
    norm: Tensor,  # () norm of the gradients as given
    *,
    rho: Number,
    lambd: Number = 1.0,
    adaptive: bool = False,
    eta: float = 0.0,
    eps: float = 1e-12,
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
    from_old: bool = False,
    ema: TensorsOrNone | None = None,  # n tensors
    kind: str | None = None,
    sigma: float = 1.0,
    lmbda: float = 0.6,
    rounding_seed: int | None = None,
) -> None:
    """The ascent of Unified SAM (arXiv 2503.02225): old_p <- p, then p <- p + rho (1 - lambd + lambd / (norm + eps)) g.

    ``rho`` may be negative: the extragradient method (arXiv 2401.08060) and Momentum-SAM step against a direction, p - |rho| g.
    ``lambd`` = 1 is SAM, 0 is USAM. ``adaptive``: g is replaced by T_w^2 g, T_w = |p| + eta, and ``norm`` is that of T_w g (ASAM).
    A weight or gradient that is not finite, with a norm that is, reaches its own element alone.
    ``from_old``: p <- old_p + ..., without saving again: from the backup of an earlier call, or from the float32 master of a 16-bit p, by
    whose value T_w is then too. The sum is rounded once. (Saving a 16-bit p in a wider old_p is refused.)
    ``grad_scale``: gradients and norm are those of a loss multiplied by it; the perturbation is that of the loss itself. Where
    ``found_inf`` is set or the norm is not finite, parameters are only saved (``from_old``: restored).
    ``ema``, ``kind``, ``sigma``, ``lmbda``: along the direction d whose norm :func:`direction_norm_` has just returned, from the moving
    average m that it has updated, instead of along g: d = m ("vasso"), or what d = g - sigma m_before is after the update,
    d = (1 + sigma (1 - lmbda) / lmbda) g - (sigma / lmbda) m ("friendly"). ``norm`` is then that of the unscaled direction. An entry of
    ``ema`` that is None was a first step: d = g.
    ``rounding_seed`` (in [0, 2^64)): bfloat16 parameters are rounded stochastically, so that the expectation of what is stored is the
    float32 result x: the upper 16 bits of the element's random word (as in :func:`random_perturb_`, the counter's last word being 1) are
    added to the bits of x, whose lower 16 are then cut off. Infinities and NaN are stored as usual, and so is what is saved or restored.
    float32 and float64 parameters are not concerned, float16 ones are refused.
    Reads p, g; writes old_p, p: 4 N s bytes (``from_old``: reads old_p, g; writes p: 3 N s, from masters with
    16-bit g 8 N; ``ema``: reads m too).
    """
    grad_weight, ema_weight = _direction_weights(Perturb.name, ema, kind, sigma, lmbda)
    lists: dict[str, Tensors | None] = {"params": params, "grads": grads, "old_params": old_params}
    if ema is None:
        check_lists(Perturb, lists)
    else:
        check_with_gaps(Perturb, lists, "ema", ema)
    if rounding_seed is not None:
        rounding_seed = check_rounding(Perturb.name, rounding_seed, params)
    if not from_old:
        check_backups(Perturb.name, params, old_params)
    op = checked(
        Perturb(
            norm=norm,
            rho=rho,
            lambd=lambd,
            adaptive=adaptive,
            eta=eta,
            eps=eps,
            grad_scale=grad_scale,
            found_inf=found_inf,
            from_old=from_old,
            grad_weight=grad_weight,
            ema_weight=ema_weight,
            rounding_seed=rounding_seed,
        )
    )
    if ema is None or isinstance(ema, TensorList):
        run(op, {**lists, "ema": ema})
        return
    for rows in by_first_step(lists, "ema", ema, like=None):
        mine = op
        # A first step goes along the gradient. Its backend expects the norm of the gradient as it is given, scaled.
        if rows.is_first and grad_scale is not None:
            mine = dataclasses.replace(op, norm=norm.to(torch.float64) * grad_scale.to(norm.device, torch.float64))
        for part in split(rows.lists, written=op.written, indices=rows.indices):
            part.run(mine)


def _direction_weights(op: str, ema: TensorsOrNone | None, kind: str | None, sigma: float, lmbda: float) -> tuple[float, float]:
    """The factors of the unscaled gradient and of the moving average, whose sum is the direction."""
    sigma = _validate.check_number(op, "sigma", sigma)
    lmbda = _validate.check_number(op, "lmbda", lmbda, low=0.0, high=1.0, open_low=True)
    if kind is not None:
        _validate.check_choice(op, "kind", kind, DIRECTIONS)
    if (ema is None) != (kind is None):
        raise ValueError(f"{op}: ema and kind belong together, got {'only ema' if kind is None else 'only kind'}")
    return (1.0 + sigma * (1.0 - lmbda) / lmbda, -sigma / lmbda) if kind == "friendly" else (0.0, 1.0)


@operation(written=Restore.written)
def restore_(params: Tensors, old_params: Tensors) -> None:
    """p <- old_p, bit for bit where the dtypes agree, and rounded once where they do not: from float32 masters too. Reads old_p; writes p:
    2 N s bytes, from masters to 16-bit p 6 N."""
    lists: dict[str, Tensors | None] = {"params": params, "old_params": old_params}
    check_lists(Restore, lists)
    run(Restore(), lists)
