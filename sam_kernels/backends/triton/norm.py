"""Norms of gradients: sqrt(sum g^2), or of T_w g with T_w = |p| + eta when adaptive.

Specification: ``sam_kernels.reference.grad_norms``; twin: ``csrc/cpu/norm.cpp``. float32, bfloat16 and float16 storage, float32 sums in two
stages of fixed order, none of them atomic: a sum a chunk, then one program adds those up (``_finish.py``). Bits depend on sizes and dtypes
alone. Reads g (and p when adaptive): 1 N s bytes.

float32 squares overflow above 1.8e19 and vanish below 3.7e-23. A chunk whose sum leaves [2^-100, 2^100] is therefore read again, scaled by
2^-80 or 2^100 (from the second-level cache, and in practice never); the finishing stage puts the three kinds together. Only a norm that
float32 cannot hold is infinite.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sam_kernels.backends.triton._blocks import is_finite, load_float, take_chunk
from sam_kernels.backends.triton._finish import (
    GROW,
    GROWN,
    HIGH,
    IN_RANGE,
    LOW,
    SHRINK,
    SHRUNK,
    Finish,
    finish_in_last_program,
    launch_sums,
    store_sum,
)
from sam_kernels.backends.triton._sums import weighted
from sam_kernels.backends.triton._table import ChunkTable, LaunchGroup, table_of
from sam_kernels.operations import CheckFinite, GradNorms, Operands

__all__ = ["check_finite_", "grad_norms", "launch_norms"]


@triton.jit
def _norm_block(
    grad, param, offsets, count, eta, factor, sums, ADAPTIVE: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    g = load_float(grad, offsets, count, MASKED)
    if SCALED:
        g = g * factor
    g = weighted(g, param, offsets, count, eta, ADAPTIVE, MASKED)
    return tl.fma(g, g, sums)


@triton.jit
def _norm_chunk(plain, aligned, full, count, eta, factor, ADAPTIVE: tl.constexpr, SCALED: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    offsets = tl.arange(0, BLOCK_SIZE)
    sums = tl.zeros([BLOCK_SIZE], tl.float32)
    for block in range(0, full, BLOCK_SIZE):
        sums = _norm_block(*aligned, block + offsets, count, eta, factor, sums, ADAPTIVE, SCALED, False)
    for block in range(full, count, BLOCK_SIZE):
        sums = _norm_block(*plain, block + offsets, count, eta, factor, sums, ADAPTIVE, SCALED, True)
    return tl.sum(sums)


@triton.jit
def _norm_kernel(
    grad_pointers,  # (R,) int64
    param_pointers,  # (R,) int64, None unless adaptive
    numels,  # (R,) int64
    work_rows,  # (C,) int32
    work_chunks,  # (C,) int32
    chunk_size,  # elements
    work_slots,  # (C,) int32
    sums,  # (C,) float32
    kinds,  # (C,) int32: how the sum is scaled
    counter,  # () int32 or None: of the last launch, whose last program makes the norm
    bounds,  # (2,) int32 or None: 0, C
    norm,  # () floating point or None
    found_inf,  # () floating point or None: set where the norm is not finite; without a norm, where a gradient is not
    skipped,  # () floating point or None: what found_inf was is added to it, and found_inf starts anew
    eta,
    DTYPES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FINISH_SIZE: tl.constexpr,
):
    ADAPTIVE: tl.constexpr = param_pointers is not None
    _, _, count, full, plain, aligned = take_chunk(
        (grad_pointers, param_pointers), numels, work_rows, work_chunks, chunk_size, DTYPES, BLOCK_SIZE
    )
    kind = IN_RANGE
    total = _norm_chunk(plain, aligned, full, count, eta, 1.0, ADAPTIVE, False, BLOCK_SIZE)
    if (total >= HIGH) | (total < LOW):
        factor = tl.where(total < LOW, GROW, SHRINK)
        kind = tl.where(total < LOW, GROWN, SHRUNK)
        total = _norm_chunk(plain, aligned, full, count, eta, factor, ADAPTIVE, True, BLOCK_SIZE)
    if norm is None:
        if found_inf is not None:
            if ~is_finite(total):  # every program that finds one stores the same
                tl.store(found_inf, 1.0)
    store_sum(total, kind, work_slots, sums, kinds)
    finish_in_last_program(sums, kinds, counter, bounds, norm, found_inf, skipped, FINISH_SIZE)


def grad_norms(op: GradNorms, lists: Operands) -> Tensor:  # (len(op.group_sizes),) float32
    """Norms of consecutive groups of rows. Reads g (and p when adaptive)."""
    table = table_of(lists, "norm")
    sizes = tuple(op.group_sizes)
    norms = torch.empty(len(sizes), dtype=torch.float32, device=table.device) if op.out is None else op.out.reshape(1)
    finish = Finish(table, sizes, norms, op.found_inf, op.skipped)
    for group in table.groups:
        launch_norms(table, group, op.eta, finish.arguments(group))
    finish.launch_rest()
    return norms


def check_finite_(op: CheckFinite, lists: Operands) -> None:
    """Sets found_inf where a gradient is not finite: the first stage alone. Reads g."""
    table = table_of(lists, "norm")
    for group in table.groups:
        launch_norms(table, group, 0.0, (None, None, None, op.found_inf, None))


def launch_norms(table: ChunkTable, group: LaunchGroup, eta: float, finishing: Sequence[Tensor | None]) -> None:
    """The first stage of a norm, for one of the groups of a table. ``finishing``: as of :class:`Finish`."""
    launch_sums(_norm_kernel, table, group, ("grads", "params"), finishing, eta, **table.constants)
