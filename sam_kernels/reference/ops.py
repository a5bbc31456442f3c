"""Every operation of :mod:`sam_kernels.functional`, one parameter at a time, in whatever dtype it is given. Tests give it float64.

First the formulas, on one parameter: pure functions, made of operators alone. Then the operations, which apply them in place to lists.

Sources: Unified SAM (arXiv 2503.02225), ASAM (arXiv 2102.11600), the algorithm boxes of ``torch.optim.SGD``, ``Adam`` and ``AdamW``, and
``torch.nn.utils.clip_grad_norm_``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from sam_kernels.reference.directions import direction_used
from sam_kernels.reference.random import rounded_stochastically, rounding_words

__all__ = ["adamw_step_", "adamw_updated", "perturb_", "perturbed", "restore_", "sgd_step_", "sgd_updated"]

Tensors = Sequence[Tensor]


def perturbed(
    p: Tensor,  # any shape
    g: Tensor,  # the shape of p
    norm: Tensor,  # () |g|, or |T g| when adaptive, over all parameters
    *,
    rho: float,
    lambd: float = 1.0,
    adaptive: bool = False,
    eta: float = 0.0,
    eps: float = 1e-12,
    grad_scale: Tensor | None = None,  # ()
) -> Tensor:
    """x + e with e = rho (1 - lambd + lambd / (|g| + eps)) g; ASAM: T^2 g for g, T = |x| + eta."""
    if grad_scale is not None:
        g, norm = g / grad_scale, norm / grad_scale
    if adaptive:
        weight = abs(p) + eta
        g = weight * weight * g
    scale = rho * ((1 - lambd) + lambd / (norm + eps))
    return p + scale * g


def descent_gradient(
    g: Tensor,  # any shape
    *,
    maximize: bool = False,
    grad_scale: Tensor | None = None,  # ()
    norm: Tensor | None = None,  # () of the gradients as given
    max_norm: float | None = None,
) -> Tensor:
    """The gradient a step descends along: unscaled, clipped by min(1, max_norm / (norm + 1e-6)), negated when ``maximize``."""
    if grad_scale is not None:
        g = g / grad_scale
        norm = None if norm is None else norm / grad_scale
    if norm is not None and max_norm is not None:
        g = (max_norm / (norm + 1e-6)).clamp(max=1.0) * g
    return -g if maximize else g


def sgd_updated(
    p: Tensor,  # any shape
    g: Tensor,  # the shape of p, from descent_gradient
    buffer: Tensor | None,  # the shape of p; None on the first step
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> tuple[Tensor, Tensor | None]:  # the new p, the new buffer
    """The box of ``torch.optim.SGD``. The first buffer is the gradient itself, without dampening."""
    g = g + weight_decay * p
    if momentum != 0:
        buffer = g if buffer is None else momentum * buffer + (1 - dampening) * g
        g = g + momentum * buffer if nesterov else buffer
    return p - lr * g, buffer


def adamw_updated(
    p: Tensor,  # any shape
    g: Tensor,  # the shape of p, from descent_gradient
    m: Tensor,  # the shape of p
    v: Tensor,  # the shape of p
    t: float | Tensor,  # the number of this step, 1 on the first
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # the new p, m, v
    """The boxes of ``torch.optim.AdamW`` (``decoupled``) and ``torch.optim.Adam``."""
    beta1, beta2 = betas
    if decoupled:
        p = (1 - lr * weight_decay) * p
    else:
        g = g + weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    return p - lr * m_hat / (v_hat.sqrt() + eps), m, v


def perturb_(
    params: Tensors,  # n tensors
    grads: Tensors,  # n tensors
    old_params: Tensors,  # n tensors
    norm: Tensor,  # () of the gradients as given
    *,
    rho: float,
    lambd: float = 1.0,
    adaptive: bool = False,
    eta: float = 0.0,
    eps: float = 1e-12,
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
    from_old: bool = False,
    ema: Sequence[Tensor | None] | None = None,  # n tensors
    kind: str | None = None,
    sigma: float = 1.0,
    lmbda: float = 0.6,
    rounding_seed: int | None = None,
) -> None:
    """old_p <- p (unless ``from_old``), then p <- :func:`perturbed` old_p, or old_p itself where the step is skipped.

    Where there is an ``ema`` the direction takes the gradient's place. With a ``rounding_seed`` a bfloat16 p is computed in float32.
    """
    for row, (p, g, old_p) in enumerate(zip(params, grads, old_params, strict=True)):
        given = [p, g, old_p] if ema is None else [p, g, old_p, *(m for m in ema[row : row + 1] if m is not None)]
        source = old_p if from_old else p.clone()
        old_p.copy_(source)
        p.copy_(source)
        if is_skipped(norm, found_inf):
            continue
        stochastic = rounding_seed is not None and p.dtype is torch.bfloat16
        if stochastic:
            source, g = source.to(torch.float32), g.to(torch.float32)
        scale = grad_scale
        if ema is not None:
            assert kind is not None
            g, scale = direction_used(g if scale is None else g / scale, ema[row], kind=kind, sigma=sigma, lmbda=lmbda), None
        x = perturbed(source, g, norm, rho=rho, lambd=lambd, adaptive=adaptive, eta=eta, eps=eps, grad_scale=scale)
        p.copy_(rounded_stochastically(x, rounding_words(given, row, cast(int, rounding_seed))) if stochastic else x)


def restore_(params: Tensors, old_params: Tensors) -> None:
    """p <- old_p."""
    for p, old_p in zip(params, old_params, strict=True):
        p.copy_(old_p)


def sgd_step_(
    params: Tensors,  # n tensors
    grads: Tensors,  # n tensors
    momentum_buffers: list[Tensor | None] | None,  # n tensors
    *,
    old_params: Tensors | None = None,  # n tensors
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
    norm: Tensor | None = None,  # () of the gradients as given
    max_norm: float | None = None,
    to_old: bool = False,
    rounding_seed: int | None = None,
) -> None:
    """p <- old_p (where given), then p, m <- :func:`sgd_updated` of old_p (or p), unless the step is skipped. A buffer that is None is a
    first step. ``to_old``: old_p <- the same, and a new buffer is of its dtype."""
    if old_params is not None:
        restore_(params, old_params)
    if is_skipped(norm, found_inf):
        return
    buffers: Sequence[Tensor | None] = [None] * len(params) if momentum == 0 else cast("list[Tensor | None]", momentum_buffers)
    sources = params if old_params is None else old_params
    for i, (p, source, g, buffer) in enumerate(zip(params, sources, grads, buffers, strict=True)):
        row = [tensor for tensor in (p, source, g, buffer) if tensor is not None]
        x, update = (_computable(p, tensor, rounding_seed) for tensor in (source, g))
        m = None if buffer is None else _computable(p, buffer, rounding_seed)
        update = descent_gradient(update, maximize=maximize, grad_scale=grad_scale, norm=norm, max_norm=max_norm)
        new_p, new_buffer = sgd_updated(
            x, update, m, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov
        )
        _write_weights(p, source, new_p, row, i, to_old=to_old, rounding_seed=rounding_seed)
        if buffer is not None and new_buffer is not None:
            buffer.copy_(new_buffer)
        elif new_buffer is not None:
            cast("list[Tensor | None]", momentum_buffers)[i] = new_buffer.to(source.dtype if to_old else p.dtype)


def _computable(p: Tensor, tensor: Tensor, rounding_seed: int | None) -> Tensor:
    """An operand of a row; in float32 where its bfloat16 p is rounded stochastically."""
    return tensor.to(torch.float32) if rounding_seed is not None and p.dtype is torch.bfloat16 else tensor


def _write_weights(p: Tensor, old_p: Tensor, x: Tensor, row: Tensors, index: int, *, to_old: bool, rounding_seed: int | None) -> None:
    if to_old:
        old_p.copy_(x)
    stochastic = rounding_seed is not None and p.dtype is torch.bfloat16
    p.copy_(rounded_stochastically(x, rounding_words(row, index, cast(int, rounding_seed))) if stochastic else x)


def adamw_step_(
    params: Tensors,  # n tensors
    grads: Tensors,  # n tensors
    exp_avgs: Tensors,  # n tensors
    exp_avg_sqs: Tensors,  # n tensors
    state_steps: Tensors,  # n () tensors: steps made so far
    *,
    old_params: Tensors | None = None,  # n tensors
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    maximize: bool = False,
    grad_scale: Tensor | None = None,  # ()
    found_inf: Tensor | None = None,  # ()
    norm: Tensor | None = None,  # () of the gradients as given
    max_norm: float | None = None,
    to_old: bool = False,
    rounding_seed: int | None = None,
) -> None:
    """p <- old_p (where given), then t <- t + 1 and p, m, v <- :func:`adamw_updated` of old_p (or p), unless the step is skipped.
    ``to_old``: old_p <- the same."""
    if old_params is not None:
        restore_(params, old_params)
    if is_skipped(norm, found_inf):
        return
    sources = params if old_params is None else old_params
    for i, (p, source, g, m, v, t) in enumerate(zip(params, sources, grads, exp_avgs, exp_avg_sqs, state_steps, strict=True)):
        t += 1
        x, update, first, second = (_computable(p, tensor, rounding_seed) for tensor in (source, g, m, v))
        update = descent_gradient(update, maximize=maximize, grad_scale=grad_scale, norm=norm, max_norm=max_norm)
        new_p, new_m, new_v = adamw_updated(
            x, update, first, second, t.item(), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decoupled=decoupled
        )
        _write_weights(p, source, new_p, [p, source, g, m, v], i, to_old=to_old, rounding_seed=rounding_seed)
        m.copy_(new_m)
        v.copy_(new_v)


def is_skipped(norm: Tensor | None, found_inf: Tensor | None) -> bool:
    """A step is skipped where the gradients were found not to be finite, by their norm or by whoever set ``found_inf``."""
    return (norm is not None and not norm.isfinite()) or (found_inf is not None and bool(found_inf != 0))
