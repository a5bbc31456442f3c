"""The CPU kernels of ``csrc/cpu``. Formulas: ``csrc/common/formulas.h``; specification: ``sam_kernels.reference``.

Arithmetic in float32 (float64 for a row that has a float64 tensor), one rounding to storage; norms are summed in float64 in an order that
does not depend on the number of threads. Threads are torch's (``torch.set_num_threads``). Every function takes lists that
:mod:`sam_kernels._grouping` made: checked, dense, on the CPU. Sweeps are those of docs/internals/contracts.md.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from sam_kernels._backend import Backend, implementations
from sam_kernels._flags import report_norm
from sam_kernels._tensor_list import slice_sizes
from sam_kernels.backends.native._cpu_lists import _cpu, _lists
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

__all__ = ["BACKEND"]


def describe() -> str:
    """One line for ``python -m sam_kernels info``."""
    threads = torch.get_num_threads()
    return f"C++ on {_cpu.instruction_set()}, {threads} thread{'' if threads == 1 else 's'}"


def grad_norms(op: GradNorms, lists: Operands) -> Tensor:  # (len(group_sizes),) float32, float64 where a gradient is float64
    """Reads g (and p when adaptive)."""
    given = _lists.describe_all(lists)
    norms = _cpu.grad_norms(op, given, torch.get_num_threads())
    dtype = torch.float64 if given["grads"].has_float64 else torch.float32
    if len(norms) != 1:
        return torch.tensor(norms, dtype=dtype, device="cpu")
    out = op.out
    if out is None or out.dtype is not dtype:
        return report_norm(torch.tensor(norms[0], dtype=dtype, device="cpu"), op.found_inf, op.skipped, out).reshape(1)
    out.fill_(norms[0] if dtype is torch.float64 else ctypes.c_float(norms[0]).value)  # fill_ refuses what float32 rounds to inf
    return report_norm(out, op.found_inf, op.skipped, None).reshape(1)


def check_finite_(op: CheckFinite, lists: Operands) -> None:
    """Reads g."""
    if not _cpu.all_finite(_lists.describe(lists["grads"]), torch.get_num_threads()):
        op.found_inf.fill_(1.0)


def perturb_(op: Perturb, lists: Operands) -> None:
    """Reads p, g, m; writes old_p, p. ``from_old``: reads old_p, g, m; writes p. A skipped one only saves (``from_old``: restores)."""
    written(lists["params"])
    _cpu.perturb(op, _lists.describe_all(lists), lists.indices, torch.get_num_threads())


def direction_norm_(op: DirectionNorm, lists: Operands) -> Tensor:  # () float64
    """Reads g, m (and p when adaptive); writes m. ``first_step``: m is only written."""
    norm = _cpu.direction_norm(op, _lists.describe_all(lists), torch.get_num_threads())
    return torch.tensor(norm, dtype=torch.float64, device="cpu")


def centralize_(op: Centralize, lists: Operands) -> Tensor:  # () float32, float64 where a gradient is float64
    """Reads g (and p when adaptive); writes g."""
    grads = lists["grads"]
    written(grads)
    given = _lists.describe_all(lists)
    norm = _cpu.centralize(op, given, slice_sizes(grads), torch.get_num_threads())
    return _reported(norm, given["grads"].has_float64, op.found_inf)


def grad_dots(op: GradDots, lists: Operands) -> Tensor:  # (3,) float64
    """Reads l, r (and o)."""
    dots: list[float] = _cpu.grad_dots(op, _lists.describe_all(lists), torch.get_num_threads())
    if op.found_inf is not None and not all(map(math.isfinite, dots)):
        op.found_inf.fill_(1.0)
    return torch.tensor(dots, dtype=torch.float64, device="cpu")


def combine_(op: Combine, lists: Operands) -> Tensor:  # () float32, float64 where an out is float64
    """Reads l, r (and o); writes out."""
    if op.found_inf is None or op.found_inf.item() == 0.0:
        written(lists["outs"])
    given = _lists.describe_all(lists)
    norm = _cpu.combine(op, given, torch.get_num_threads())
    return _reported(norm, given["outs"].has_float64, op.found_inf)


def _reported(norm: float, is_double: bool, found_inf: Tensor | None) -> Tensor:  # ()
    return report_norm(torch.tensor(norm, dtype=torch.float64 if is_double else torch.float32, device="cpu"), found_inf, None, None)


def random_perturb_(op: RandomPerturb, lists: Operands) -> None:
    """Reads p; writes old_p, p. ``from_old``: reads old_p; writes p."""
    written(lists["params"])
    _cpu.random_perturb(op, _lists.describe_all(lists), lists.indices, torch.get_num_threads())


def restore_(op: Restore, lists: Operands) -> None:
    """Reads old_p; writes p."""
    written(lists["params"])
    _cpu.copy(_lists.describe(lists["params"]), _lists.describe(lists["old_params"]), torch.get_num_threads())


def sgd_step_(op: SgdStep, lists: Operands) -> bool:  # whether the step was made
    """Reads old_p (or p), g, m; writes p, m; ``to_old``: and old_p. ``first_step``: m is only written."""
    return _written_by(op, _cpu.sgd(op, _lists.describe_all(lists), lists.indices, torch.get_num_threads()), lists)


def adamw_step_(op: AdamWStep, lists: Operands) -> bool:  # whether the step was made
    """Reads old_p (or p), g, m, v; writes p, m, v; ``to_old``: and old_p. Adds one to every ``state_steps``, unless skipped."""
    return _written_by(op, _cpu.adamw(op, _lists.describe_all(lists), lists.indices, torch.get_num_threads()), lists)


def _written_by(op: Descent, made: bool, lists: Operands) -> bool:
    """``made``. A skipped step has written the parameters only where it restored them."""
    if made or "old_params" in lists:
        written(lists["params"])
    if made and op.to_old:
        written(lists["old_params"])
    return made


BACKEND = Backend(
    name="native.cpu",
    operations=implementations(globals()),
    trust=_lists.trust,
    current_grads=_lists.current_grads,
    is_current=_lists.is_current,
    current_local_grads=_lists.current_local_grads,
    are_locals_of=_lists.are_locals_of,
    describe=describe,
    device_types=frozenset({"cpu"}),
    knows_skips=True,
)
