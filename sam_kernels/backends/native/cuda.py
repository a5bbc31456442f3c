"""The CUDA kernels of ``csrc/cuda``. Formulas: ``csrc/common/formulas.h``; specification: ``sam_kernels.reference``.

Arithmetic in float32 (float64 for a row that has a float64 tensor), one rounding to storage; norms are summed in a fixed order. A launch
takes its tensors' addresses by value: nothing is copied to the device beforehand, and a CUDA graph can record everything. The host waits
for nothing. Every function takes lists that :mod:`sam_kernels._grouping` made: checked, dense, on one device.

``SAM_KERNELS_CUDA_ON_HOST=1``: the same code compiled for the host runs on CPU tensors, for the tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sam_kernels._backend import Backend, implementations
from sam_kernels._tensor_list import TensorList, slice_sizes
from sam_kernels.backends.native import CUDA_ON_HOST
from sam_kernels.backends.native._architectures import runs_on
from sam_kernels.backends.native._arguments import readable, write_back
from sam_kernels.backends.native._cuda_lists import _cuda, _lists, _stream, _sums
from sam_kernels.backends.native._lists import written
from sam_kernels.operations import (
    AdamWStep,
    Centralize,
    CheckFinite,
    Combine,
    Descent,
    DirectionNorm,
    GradDots,
    GradNorms,
    Operands,
    Perturb,
    RandomPerturb,
    Restore,
    SgdStep,
)

__all__ = ["BACKEND", "elements_per_thread"]


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


def describe() -> str:
    """One line for ``python -m sam_kernels info``."""
    return "CUDA kernels compiled for the host" if CUDA_ON_HOST else f"CUDA kernels for compute capabilities {_cuda.ARCHITECTURES}"


def elements_per_thread(numel: int) -> int:
    """The most elements of a tensor of ``numel`` elements that one thread of ``grad_norms`` or ``grad_dots`` adds up."""
    longest: int = min(numel, _cuda.longest_chunk())
    threads: int = _cuda.THREADS
    return -(-longest // threads)


def grad_norms(op: GradNorms, lists: Operands) -> Tensor:  # (len(group_sizes),) float32, float64 where a gradient is float64
    """Reads g (and p when adaptive)."""
    given = _lists.describe_all(lists)
    dtype = torch.float64 if given["grads"].has_float64 else torch.float32
    # Kernels write float32 or float64: into ``out`` where that is its dtype. Another one is rounded once, as on every backend.
    out = op.out
    norms = None if out is None or out.dtype is not dtype else out.reshape(1)
    if norms is None:
        norms = torch.empty(len(op.group_sizes), dtype=dtype, device=lists.device)
    sums, used = _sums(given["grads"], lists.device), readable(op)
    _cuda.grad_norms(used, given, sums.data_ptr(), norms.data_ptr(), dtype is torch.float64, _stream(lists.device))
    if out is not None and out.dtype is not dtype:
        out.copy_(norms.reshape(out.shape))
    write_back(op, used)
    return norms


def check_finite_(op: CheckFinite, lists: Operands) -> None:
    """Reads g."""
    used = readable(op)
    _cuda.check_finite(used, _lists.describe_all(lists), _stream(lists.device))
    write_back(op, used)


def perturb_(op: Perturb, lists: Operands) -> None:
    """Reads p, g, m; writes old_p, p. ``from_old``: reads old_p, g, m; writes p. A skipped one only saves (``from_old``: restores)."""
    written(lists["params"])
    used = readable(op)
    _cuda.perturb(used, _lists.describe_all(lists), lists.indices, _stream(lists.device))


def direction_norm_(op: DirectionNorm, lists: Operands) -> Tensor:  # () float64
    """Reads g, m (and p when adaptive); writes m. ``first_step``: m is only written."""
    given, used = _lists.describe_all(lists), readable(op)
    sums = _sums(given["grads"], lists.device)
    norm = torch.empty((), dtype=torch.float64, device=lists.device)
    _cuda.direction_norm(used, given, sums.data_ptr(), norm.data_ptr(), True, _stream(lists.device))
    return norm


def centralize_(op: Centralize, lists: Operands) -> Tensor:  # () float32, float64 where a gradient is float64
    """Reads g (and p when adaptive); writes g."""
    written(lists["grads"])
    given, used, sizes = _lists.describe_all(lists), readable(op), slice_sizes(lists["grads"])
    is_double = given["grads"].has_float64
    sums = _sums(given["grads"], lists.device, slice_sizes=sizes)
    norm = torch.empty((), dtype=torch.float64 if is_double else torch.float32, device=lists.device)
    _cuda.centralize(used, given, sizes, sums.data_ptr(), norm.data_ptr(), is_double, _stream(lists.device))
    write_back(op, used)
    return norm


def grad_dots(op: GradDots, lists: Operands) -> Tensor:  # (3,) float64
    """Reads l, r (and o)."""
    given, used = _lists.describe_all(lists), readable(op)
    sums = _sums(given["lefts"], lists.device, of_chunk=3)
    dots = torch.empty(3, dtype=torch.float64, device=lists.device)
    _cuda.grad_dots(used, given, sums.data_ptr(), dots.data_ptr(), True, _stream(lists.device))
    write_back(op, used)
    return dots


def combine_(op: Combine, lists: Operands) -> Tensor:  # () float32, float64 where an out is float64
    """Reads l, r (and o); writes out."""
    written(lists["outs"])
    given, used = _lists.describe_all(lists), readable(op)
    is_double = given["outs"].has_float64
    sums = _sums(given["outs"], lists.device)
    norm = torch.empty((), dtype=torch.float64 if is_double else torch.float32, device=lists.device)
    _cuda.combine(used, given, sums.data_ptr(), norm.data_ptr(), is_double, _stream(lists.device))
    write_back(op, used)
    return norm


def random_perturb_(op: RandomPerturb, lists: Operands) -> None:
    """Reads p; writes old_p, p. ``from_old``: reads old_p; writes p."""
    written(lists["params"])
    used = readable(op)
    _cuda.random_perturb(used, _lists.describe_all(lists), lists.indices, _stream(lists.device))


def restore_(op: Restore, lists: Operands) -> None:
    """Reads old_p; writes p."""
    written(lists["params"])
    _cuda.copy(_lists.describe(lists["params"]), _lists.describe(lists["old_params"]), _stream(lists.device))


def sgd_step_(op: SgdStep, lists: Operands) -> bool:  # always True: whether the step was made only the device knows
    """Reads old_p (or p), g, m; writes p, m; ``to_old``: and old_p. ``first_step``: m is only written."""
    _written_by(op, lists)
    used = readable(op)
    _cuda.sgd(used, _lists.describe_all(lists), lists.indices, _stream(lists.device))
    return True


def adamw_step_(op: AdamWStep, lists: Operands) -> bool:  # always True: whether the step was made only the device knows
    """Reads old_p (or p), g, m, v; writes p, m, v; ``to_old``: and old_p. Adds one to every ``state_steps``, unless skipped. Counters that
    are not float32 on the parameters' device make it wait."""
    _written_by(op, lists)
    steps, used = lists["state_steps"], readable(op)
    advanced = steps if _are_float32_on(steps, lists.device) else [step.to(lists.device, torch.float32, copy=True) for step in steps]
    given = _lists.describe_all({**lists, "state_steps": advanced})
    # The kernels know a row by one number: where it counts for random numbers, by that of the caller's list.
    count = len(steps) if op.rounding_seed is None else max(lists.indices) + 1
    corrections = torch.empty(2 * count, dtype=torch.float64, device=lists.device)
    _cuda.adamw(used, given, lists.indices, corrections.data_ptr(), _stream(lists.device))
    if advanced is not steps:
        for step, made in zip(steps, advanced, strict=True):
            step.copy_(made)
    return True


def _written_by(op: Descent, lists: Operands) -> None:
    written(lists["params"])
    if op.to_old:
        written(lists["old_params"])


def _are_float32_on(steps: list[Tensor], device: torch.device) -> bool:
    if not isinstance(steps, TensorList) and not all(step.device == device for step in steps):
        return False
    only_float32: bool = _lists.describe(steps).only_float32
    return only_float32


BACKEND = Backend(
    name="native.cuda",
    operations=implementations(globals()),
    trust=_lists.trust,
    current_grads=_lists.current_grads,
    is_current=_lists.is_current,
    current_local_grads=_lists.current_local_grads,
    are_locals_of=_lists.are_locals_of,
    describe=describe,
    device_types=frozenset({"cpu" if CUDA_ON_HOST else "cuda"}),
    knows_skips=False,  # that would mean to wait for the device
    reason_missing=_reason_missing(),
)
