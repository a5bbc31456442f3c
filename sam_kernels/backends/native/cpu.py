"""The CPU kernels of ``csrc/cpu``. Formulas: ``csrc/common/formulas.h``; specification: ``sam_kernels.reference``.

Arithmetic in float32 (float64 for a row that has a float64 tensor), one rounding to storage; norms are summed in float64 in an order that
does not depend on the number of threads. Threads are torch's (``torch.set_num_threads``). Every function takes lists that
:mod:`sam_kernels._grouping` made: checked, dense, on the CPU. Bytes are those of docs/architecture.md.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sam_kernels._flags import report_norm
from sam_kernels.backends.native._arguments import value_of
from sam_kernels.backends.native._lists import Lists, written

try:
    from sam_kernels import _cpu
except ImportError as error:
    raise ImportError(f"the compiled module sam_kernels._cpu cannot be imported ({error}); reinstall with a C++ compiler") from error

__all__ = [
    "DEVICE_TYPES",
    "DTYPES",
    "IS_AUTOMATIC",
    "KNOWS_SKIPS",
    "REFUSES_NO_MEMORY",
    "adamw_step_",
    "centralize_",
    "check_finite_",
    "combine_",
    "current_grads",
    "describe",
    "direction_norm_",
    "grad_dots",
    "grad_norms",
    "is_current",
    "perturb_",
    "random_perturb_",
    "restore_",
    "sgd_step_",
    "vouch",
]

DEVICE_TYPES = frozenset({"cpu"})
DTYPES = None  # all that operations take
IS_AUTOMATIC = True
KNOWS_SKIPS = True
REFUSES_NO_MEMORY = True

_lists = Lists(_cpu)
vouch, current_grads, is_current = _lists.vouch, _lists.current_grads, _lists.is_current


def describe() -> str:
    """One line for ``python -m sam_kernels info``."""
    return f"C++ on {_cpu.instruction_set()}, {torch.get_num_threads()} threads"


def _inverse(grad_scale: Tensor | None) -> float:
    return 1.0 if grad_scale is None else 1.0 / grad_scale.item()


def _skips(norm: Tensor | None, found_inf: Tensor | None) -> bool:
    return (found_inf is not None and found_inf.item() != 0.0) or (norm is not None and not math.isfinite(norm.item()))


def grad_norms(
    grads: Sequence[Tensor],
    params: Sequence[Tensor] | None,
    group_sizes: Sequence[int],
    *,
    adaptive: bool,
    eta: float,
    found_inf: Tensor | None,
    skipped: Tensor | None,
    out: Tensor | None,
) -> Tensor:  # (len(group_sizes),) float32, float64 where a gradient is float64
    """Norms of consecutive groups of rows, reported where there is one. Reads g (and p when adaptive)."""
    described = _lists.describe(grads)
    norms = _norms(described, _lists.describe(params) if adaptive else None, group_sizes, adaptive=adaptive, eta=eta)
    dtype = torch.float64 if described.has_float64 else torch.float32
    if len(norms) != 1:
        return torch.tensor(norms, dtype=dtype, device="cpu")
    if out is None or out.dtype is not dtype:
        return report_norm(torch.tensor(norms[0], dtype=dtype, device="cpu"), found_inf, skipped, out).reshape(1)
    out.fill_(norms[0] if dtype is torch.float64 else ctypes.c_float(norms[0]).value)  # fill_ refuses what float32 rounds to inf
    return report_norm(out, found_inf, skipped, None).reshape(1)


def _norms(grads: Any, params: Any, group_sizes: Sequence[int], *, adaptive: bool, eta: float) -> list[float]:
    """Of lists as C++ describes them."""
    threads = torch.get_num_threads()
    return list(_cpu.grad_norms(grads=grads, params=params, group_sizes=list(group_sizes), adaptive=adaptive, eta=eta, threads=threads))


def check_finite_(grads: Sequence[Tensor], found_inf: Tensor) -> None:
    """Sets found_inf where a gradient is not finite. Reads g, a second time where a float64 one is very large."""
    described = _lists.describe(grads)
    if math.isfinite(_norms(described, None, [len(grads)], adaptive=False, eta=0.0)[0]):
        return
    # Sums of float32 squares overflow for nothing else. Those of float64 ones do above 1e154.
    if not described.has_float64 or not all(torch.isfinite(grad).all() for grad in grads):
        found_inf.fill_(1.0)


def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    old_params: Sequence[Tensor],
    norm: Tensor,  # ()
    *,
    rho: float | Tensor,  # ()
    lambd: float | Tensor,  # ()
    adaptive: bool,
    eta: float,
    eps: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    from_old: bool,
    ema: Sequence[Tensor] | None,
    grad_weight: float,
    ema_weight: float,
    rounding_seed: int | None,
    row_indices: Sequence[int],
) -> None:
    """Reads p, g, m; writes old_p, p. ``from_old``: reads old_p, g, m; writes p. A skipped one only saves (``from_old``: restores).

    With ``ema``, m, the direction is grad_weight g / grad_scale + ema_weight m (without g where its weight is 0) and ``norm`` is its own.
    """
    threads = torch.get_num_threads()
    written(params)
    if _skips(norm, found_inf):
        _cpu.copy(params=_lists.describe(params), old_params=_lists.describe(old_params), save=not from_old, threads=threads)
        return
    arguments = {
        "params": _lists.describe(params),
        "grads": _lists.describe(grads),
        "old_params": _lists.describe(old_params),
        "norm": norm.item(),
        "rho": value_of(rho),
        "lambd": value_of(lambd),
        "eps": eps,
        "eta": eta,
        "inv_grad_scale": _inverse(grad_scale),
        "adaptive": adaptive,
        "from_old": from_old,
        "threads": threads,
    }
    if ema is None and rounding_seed is None:
        _cpu.perturb(**arguments)
        return
    _cpu.perturb_variant(
        ema=_lists.describe(ema),
        grad_weight=grad_weight,
        ema_weight=ema_weight,
        rounding_seed=rounding_seed,
        row_indices=row_indices,
        **arguments,
    )


def direction_norm_(
    grads: Sequence[Tensor],
    ema: Sequence[Tensor],
    params: Sequence[Tensor] | None,
    *,
    kind: str,
    first_step: bool,
    theta: float,
    sigma: float,
    lmbda: float,
    adaptive: bool,
    eta: float,
    grad_scale: Tensor | None,
) -> Tensor:  # () float64
    """Reads g, m (and p when adaptive); writes m. ``first_step``: m is only written."""
    norm = _cpu.direction_norm(
        params=_lists.describe(params) if adaptive else None,
        grads=_lists.describe(grads),
        ema=_lists.describe(ema),
        adaptive=adaptive,
        friendly=kind == "friendly",
        first_step=first_step,
        eta=eta,
        inv_grad_scale=_inverse(grad_scale),
        decay=lmbda if kind == "friendly" else 1.0 - theta,
        gain=1.0 - lmbda if kind == "friendly" else theta,
        sigma=sigma,
        threads=torch.get_num_threads(),
    )
    return torch.tensor(norm, dtype=torch.float64, device="cpu")


def centralize_(
    grads: Sequence[Tensor],
    params: Sequence[Tensor] | None,
    slice_sizes: Sequence[int],  # n: 0 for a tensor that is left as it is
    *,
    adaptive: bool,
    eta: float,
    found_inf: Tensor | None,
) -> Tensor:  # () float32, float64 where a gradient is float64
    """Reads g (and p when adaptive); writes g."""
    written(grads)
    described = _lists.describe(grads)
    norm = _cpu.centralize(
        params=_lists.describe(params) if adaptive else None,
        grads=described,
        slice_sizes=slice_sizes,
        adaptive=adaptive,
        eta=eta,
        threads=torch.get_num_threads(),
    )
    result = torch.tensor(norm, dtype=torch.float64 if described.has_float64 else torch.float32, device="cpu")
    return report_norm(result, found_inf, None, None)


def grad_dots(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], origins: Sequence[Tensor] | None, *, found_inf: Tensor | None
) -> Tensor:  # (3,) float64
    """Reads l, r (and o)."""
    dots: list[float] = _cpu.grad_dots(
        lefts=_lists.describe(lefts), rights=_lists.describe(rights), origins=_lists.describe(origins), threads=torch.get_num_threads()
    )
    if found_inf is not None and not all(map(math.isfinite, dots)):
        found_inf.fill_(1.0)
    return torch.tensor(dots, dtype=torch.float64, device="cpu")


def combine_(
    outs: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    origins: Sequence[Tensor] | None,
    *,
    left_weight: float | Tensor,  # ()
    right_weight: float | Tensor,  # ()
    origin_weight: float | Tensor,  # ()
    found_inf: Tensor | None,
) -> Tensor:  # () float32, float64 where an out is float64
    """Reads l, r (and o); writes out."""
    writes = not _skips(None, found_inf)
    if writes:
        written(outs)
    described = _lists.describe(outs)
    norm = _cpu.combine(
        outs=described,
        lefts=_lists.describe(lefts),
        rights=_lists.describe(rights),
        origins=_lists.describe(origins),
        left_weight=value_of(left_weight),
        right_weight=value_of(right_weight),
        origin_weight=value_of(origin_weight),
        writes=writes,
        threads=torch.get_num_threads(),
    )
    result = torch.tensor(norm, dtype=torch.float64 if described.has_float64 else torch.float32, device="cpu")
    return report_norm(result, found_inf, None, None)


def random_perturb_(
    params: Sequence[Tensor],
    old_params: Sequence[Tensor],
    row_indices: Sequence[int],
    *,
    seed: int,
    scale: float | Tensor,  # ()
    distribution: str,
    from_old: bool,
) -> None:
    """Reads p; writes old_p, p. ``from_old``: reads old_p; writes p."""
    written(params)
    _cpu.random_perturb(
        params=_lists.describe(params),
        old_params=_lists.describe(old_params),
        row_indices=row_indices,
        seed=seed,
        scale=value_of(scale),
        normal=distribution == "normal",
        from_old=from_old,
        threads=torch.get_num_threads(),
    )


def restore_(params: Sequence[Tensor], old_params: Sequence[Tensor]) -> None:
    """Reads old_p; writes p."""
    written(params)
    _cpu.copy(params=_lists.describe(params), old_params=_lists.describe(old_params), save=False, threads=torch.get_num_threads())


def sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    *,
    old_params: Sequence[Tensor] | None,
    lr: float | Tensor,  # ()
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    norm: Tensor | None,
    max_norm: float | None,
) -> bool:  # whether the step was made
    """Reads old_p (or p), g, m; writes p, m. ``first_step``: m is only written."""
    if _skips(norm, found_inf):
        if old_params is not None:
            restore_(params, old_params)
        return False
    written(params)
    _cpu.sgd(
        params=_lists.describe(params),
        grads=_lists.describe(grads),
        old_params=_lists.describe(old_params),
        momentum_buffers=_lists.describe(momentum_buffers),
        lr=value_of(lr),
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        grad_multiplier=_grad_multiplier(maximize, grad_scale, norm, max_norm),
        nesterov=nesterov,
        first_step=first_step,
        threads=torch.get_num_threads(),
    )
    return True


def adamw_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    old_params: Sequence[Tensor] | None,
    lr: float | Tensor,  # ()
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    norm: Tensor | None,
    max_norm: float | None,
) -> bool:  # whether the step was made
    """Reads old_p (or p), g, m, v; writes p, m, v. Adds one to every ``state_steps``, unless skipped."""
    if _skips(norm, found_inf):
        if old_params is not None:
            restore_(params, old_params)
        return False
    written(params)
    _cpu.adamw(
        params=_lists.describe(params),
        grads=_lists.describe(grads),
        old_params=_lists.describe(old_params),
        exp_avgs=_lists.describe(exp_avgs),
        exp_avg_sqs=_lists.describe(exp_avg_sqs),
        steps=_cpu.advance_steps(_lists.describe(state_steps)),
        lr=value_of(lr),
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        grad_multiplier=_grad_multiplier(maximize, grad_scale, norm, max_norm),
        decoupled=decoupled,
        threads=torch.get_num_threads(),
    )
    return True


def _grad_multiplier(maximize: bool, grad_scale: Tensor | None, norm: Tensor | None, max_norm: float | None) -> float:
    multiplier: float = _cpu.grad_multiplier(
        maximize=maximize,
        inv_grad_scale=_inverse(grad_scale),
        norm=0.0 if norm is None else norm.item(),
        max_norm=max_norm,
    )
    return multiplier
