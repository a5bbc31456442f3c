"""The CUDA kernels of ``csrc/cuda``. Formulas: ``csrc/common/formulas.h``; specification: ``sam_kernels.reference``.

Arithmetic in float32 (float64 for a row that has a float64 tensor), one rounding to storage; norms are summed in a fixed order. A launch
takes its tensors' addresses by value: nothing is copied to the device beforehand, and a CUDA graph can record everything. The host waits
for nothing. Every function takes lists that :mod:`sam_kernels._grouping` made: checked, dense, on one device.

``SAM_KERNELS_CUDA_ON_HOST=1``: the same code compiled for the host runs on CPU tensors, for the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sam_kernels._tensor_list import TensorList
from sam_kernels.backends.native import CUDA_ON_HOST
from sam_kernels.backends.native._architectures import runs_on
from sam_kernels.backends.native._arguments import address, flag_of, number_of, readable, write_back
from sam_kernels.backends.native._cuda_lists import _cuda, _lists, _stream, _sums
from sam_kernels.backends.native._lists import written
from sam_kernels.backends.native.cuda_centralize import centralize_
from sam_kernels.backends.native.cuda_combinations import combine_, grad_dots

__all__ = [
    "DEVICE_TYPES",
    "DTYPES",
    "IS_AUTOMATIC",
    "KNOWS_SKIPS",
    "REASON_MISSING",
    "REFUSES_NO_MEMORY",
    "adamw_step_",
    "centralize_",
    "check_finite_",
    "combine_",
    "current_grads",
    "describe",
    "direction_norm_",
    "elements_per_thread",
    "grad_dots",
    "grad_norms",
    "is_current",
    "perturb_",
    "random_perturb_",
    "restore_",
    "sgd_step_",
    "vouch",
]

DEVICE_TYPES = frozenset({"cpu" if CUDA_ON_HOST else "cuda"})
DTYPES = None  # all that operations take
IS_AUTOMATIC = True
KNOWS_SKIPS = False  # that would mean to wait for the device
REFUSES_NO_MEMORY = True

vouch, current_grads, is_current = _lists.vouch, _lists.current_grads, _lists.is_current


def _reason_missing() -> str | None:
    """Why no kernel can run here. Looks at no more than what devices there are: no context is made."""
    if CUDA_ON_HOST:
        return None
    reason: str = _cuda.reason_missing()
    if reason:
        return reason
    for device in range(torch.cuda.device_count()):
        capability: int = _cuda.capability(device)
        if not runs_on(_cuda.ARCHITECTURES, capability):
            here = f"{capability // 10}.{capability % 10}"
            return (
                f"sam_kernels._cuda was built for compute capabilities {_cuda.ARCHITECTURES}, cuda:{device} has {here}; "
                f"reinstall with TORCH_CUDA_ARCH_LIST={here}"
            )
    return None


REASON_MISSING = _reason_missing()


def describe() -> str:
    """One line for ``python -m sam_kernels info``."""
    return "CUDA kernels compiled for the host" if CUDA_ON_HOST else f"CUDA kernels for compute capabilities {_cuda.ARCHITECTURES}"


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
    """Norms of consecutive groups of rows. Reads g (and p when adaptive)."""
    described = _lists.describe(grads)
    dtype = torch.float64 if described.has_float64 else torch.float32
    # Kernels write float32 or float64: into ``out`` where that is its dtype. Another one is rounded once, as on every backend.
    norms = None if out is None or out.dtype is not dtype else out.reshape(1)
    if norms is None:
        norms = torch.empty(len(group_sizes), dtype=dtype, device=grads[0].device)
    sums = _sums(described, grads[0])
    flag, count = flag_of(found_inf), flag_of(skipped)
    _cuda.grad_norms(
        grads=described,
        params=_lists.describe(params) if adaptive else None,
        group_sizes=group_sizes,
        adaptive=adaptive,
        eta=eta,
        sums=sums.data_ptr(),
        norms=norms.data_ptr(),
        is_double=norms.dtype is torch.float64,
        found_inf=address(flag),
        skipped=address(count),
        stream=_stream(grads[0]),
    )
    write_back(found_inf, flag)
    write_back(skipped, count)
    if out is not None and out.dtype is not dtype:
        out.copy_(norms.reshape(out.shape))
    return norms


def elements_per_thread(numel: int) -> int:
    """The most elements of a tensor of ``numel`` elements that one thread of ``grad_norms`` or ``grad_dots`` adds up."""
    longest: int = min(numel, _cuda.longest_chunk())
    threads: int = _cuda.THREADS
    return -(-longest // threads)


def check_finite_(grads: Sequence[Tensor], found_inf: Tensor) -> None:
    """Sets found_inf where a gradient is not finite. Reads g."""
    flag = flag_of(found_inf)
    _cuda.check_finite(grads=_lists.describe(grads), found_inf=address(flag), stream=_stream(grads[0]))
    write_back(found_inf, flag)


def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    old_params: Sequence[Tensor],
    norm: Tensor,  # ()
    *,
    rho: float | Tensor,
    lambd: float | Tensor,
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
    written(params)
    scale, flag, length = readable(grad_scale, found_inf, norm)
    _cuda.perturb(
        params=_lists.describe(params),
        grads=_lists.describe(grads),
        old_params=_lists.describe(old_params),
        ema=_lists.describe(ema),
        row_indices=None if rounding_seed is None else row_indices,
        norm=number_of(length),
        rho=number_of(rho),
        lambd=number_of(lambd),
        eps=eps,
        eta=eta,
        grad_scale=number_of(scale),
        found_inf=number_of(flag),
        adaptive=adaptive,
        from_old=from_old,
        grad_weight=grad_weight,
        ema_weight=ema_weight,
        rounding_seed=rounding_seed,
        stream=_stream(params[0]),
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
    described = _lists.describe(grads)
    sums = _sums(described, grads[0])
    (scale,) = readable(grad_scale)
    norm = torch.empty((), dtype=torch.float64, device=grads[0].device)
    _cuda.direction_norm(
        grads=described,
        ema=_lists.describe(ema),
        params=_lists.describe(params) if adaptive else None,
        adaptive=adaptive,
        friendly=kind == "friendly",
        first_step=first_step,
        eta=eta,
        grad_scale=number_of(scale),
        decay=lmbda if kind == "friendly" else 1.0 - theta,
        gain=1.0 - lmbda if kind == "friendly" else theta,
        sigma=sigma,
        sums=sums.data_ptr(),
        norm=norm.data_ptr(),
        stream=_stream(grads[0]),
    )
    return norm


def random_perturb_(
    params: Sequence[Tensor],
    old_params: Sequence[Tensor],
    row_indices: Sequence[int],
    *,
    seed: int,
    scale: float | Tensor,
    distribution: str,
    from_old: bool,
) -> None:
    """Reads p; writes old_p, p. ``from_old``: reads old_p; writes p."""
    written(params)
    _cuda.random_perturb(
        params=_lists.describe(params),
        old_params=_lists.describe(old_params),
        row_indices=row_indices,
        seed=seed,
        scale=number_of(scale),
        normal=distribution == "normal",
        from_old=from_old,
        stream=_stream(params[0]),
    )


def restore_(params: Sequence[Tensor], old_params: Sequence[Tensor]) -> None:
    """Reads old_p; writes p."""
    written(params)
    _cuda.copy(destination=_lists.describe(params), source=_lists.describe(old_params), stream=_stream(params[0]))


def sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    *,
    old_params: Sequence[Tensor] | None,
    lr: float | Tensor,
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
) -> bool:  # always True: whether the step was made only the device knows
    """Reads old_p (or p), g, m; writes p, m. ``first_step``: m is only written."""
    written(params)
    scale, flag, length = readable(grad_scale, found_inf, norm)
    _cuda.sgd(
        params=_lists.describe(params),
        grads=_lists.describe(grads),
        old_params=_lists.describe(old_params),
        momentum_buffers=_lists.describe(momentum_buffers),
        lr=number_of(lr),
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        first_step=first_step,
        grad_scale=number_of(scale),
        found_inf=number_of(flag),
        norm=number_of(length),
        max_norm=max_norm,
        stream=_stream(params[0]),
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
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    norm: Tensor | None,
    max_norm: float | None,
) -> bool:  # always True: whether the step was made only the device knows
    """Reads old_p (or p), g, m, v; writes p, m, v. Adds one to every ``state_steps``, unless skipped. Counters that are not float32 on the
    parameters' device make it wait."""
    written(params)
    device = params[0].device
    steps, described = state_steps, _described_steps(state_steps, device)
    if described is None:
        steps = [step.to(device, torch.float32, copy=True) for step in state_steps]
        described = _lists.describe(steps)
    scale, flag, length = readable(grad_scale, found_inf, norm)
    corrections = torch.empty(2 * len(steps), dtype=torch.float64, device=device)
    _cuda.adamw(
        params=_lists.describe(params),
        grads=_lists.describe(grads),
        old_params=_lists.describe(old_params),
        exp_avgs=_lists.describe(exp_avgs),
        exp_avg_sqs=_lists.describe(exp_avg_sqs),
        state_steps=described,
        corrections=corrections.data_ptr(),
        lr=number_of(lr),
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        maximize=maximize,
        grad_scale=number_of(scale),
        found_inf=number_of(flag),
        norm=number_of(length),
        max_norm=max_norm,
        stream=_stream(params[0]),
    )
    if steps is not state_steps:
        for step, advanced in zip(state_steps, steps, strict=True):
            step.copy_(advanced)
    return True


def _described_steps(state_steps: Sequence[Tensor], device: torch.device) -> Any:
    """The counters as kernels take them; None where they are not float32 on ``device``."""
    if not isinstance(state_steps, TensorList) and not all(step.device == device for step in state_steps):
        return None
    described = _lists.describe(state_steps)
    return described if described.only_float32 else None
