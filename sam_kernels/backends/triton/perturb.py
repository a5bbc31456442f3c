"""The ascent: old_p <- p, p <- p + s g, or p + s T_w^2 g with T_w = |p| + eta when adaptive; and the copy that takes it back.

Specification: ``sam_kernels.reference.perturb_``; twin: ``csrc/cpu/perturb.cpp``. float32, bfloat16 and float16 storage in any mix, float32
arithmetic, one rounding. The scale s = rho (1 - lambd + lambd / (norm / grad_scale + eps)) / grad_scale is computed by every program from
scalars in device memory, so the host never waits. Where the step is skipped parameters are only saved (from_old: restored).
Reads p, g; writes old_p, p: 4 N s bytes (from_old: reads old_p, g; writes p: 3 N s). Restoring: 2 N s.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from sam_kernels.backends.triton._blocks import (
    convert,
    copy_chunk,
    full_blocks,
    inverse_of,
    is_skipped,
    load,
    load_float,
    locate,
    operand,
    store,
)
from sam_kernels.backends.triton._launch import launch, written
from sam_kernels.backends.triton._table import table_of

__all__ = ["perturb_", "restore_"]


@triton.jit
def _perturb_block(
    param, grad, old_param, offsets, count, scale, eta, FROM_OLD: tl.constexpr, ADAPTIVE: tl.constexpr, MASKED: tl.constexpr
):
    g = load_float(grad, offsets, count, MASKED)
    if FROM_OLD:
        p = load_float(old_param, offsets, count, MASKED)
    else:
        stored = load(param, offsets, count, MASKED)
        store(old_param, offsets, count, stored, MASKED)
        p = convert(stored, tl.float32)
    if ADAPTIVE:
        weight = tl.abs(p) + eta
        g = weight * weight * g
    store(param, offsets, count, p + g * scale, MASKED)


@triton.jit
def _perturb_kernel(
    param_pointers,  # (R,) int64
    grad_pointers,  # (R,) int64
    old_param_pointers,  # (R,) int64
    numels,  # (R,) int64
    work_rows,  # (C,) int32
    work_chunks,  # (C,) int32
    norm,  # () float32
    grad_scale,  # () float32 or None
    found_inf,  # () float32 or None
    rho,
    one_minus_lambd,
    lambd,
    eps,
    eta,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    OLD_PARAM: tl.constexpr,
    FROM_OLD: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row, start, count = locate(work_rows, work_chunks, numels, CHUNK_SIZE)
    param_address, param, aligned_param = operand(param_pointers, row, start, PARAM)
    grad_address, grad, aligned_grad = operand(grad_pointers, row, start, GRAD)
    old_address, old_param, aligned_old_param = operand(old_param_pointers, row, start, OLD_PARAM)
    if is_skipped(norm, found_inf):
        full = full_blocks(param_address | old_address, count, BLOCK_SIZE)
        if FROM_OLD:
            copy_chunk(param, aligned_param, old_param, aligned_old_param, count, full, BLOCK_SIZE)
        else:
            copy_chunk(old_param, aligned_old_param, param, aligned_param, count, full, BLOCK_SIZE)
    else:
        inverse = inverse_of(grad_scale)
        unscaled = tl.load(norm).to(tl.float32) * inverse
        scale = rho * (one_minus_lambd + tl.div_rn(lambd, unscaled + eps)) * inverse
        full = full_blocks(param_address | grad_address | old_address, count, BLOCK_SIZE)
        HALF: tl.constexpr = BLOCK_SIZE // 2  # of the masked blocks: see _blocks.py
        offsets, half = tl.arange(0, BLOCK_SIZE), tl.arange(0, HALF)
        for block in range(0, full, BLOCK_SIZE):
            _perturb_block(aligned_param, aligned_grad, aligned_old_param, block + offsets, count, scale, eta, FROM_OLD, ADAPTIVE, False)
        for block in range(full, count, HALF):
            _perturb_block(param, grad, old_param, block + half, count, scale, eta, FROM_OLD, ADAPTIVE, True)


@triton.jit
def _copy_kernel(
    destination_pointers,  # (R,) int64
    source_pointers,  # (R,) int64
    numels,  # (R,) int64
    work_rows,  # (C,) int32
    work_chunks,  # (C,) int32
    DESTINATION: tl.constexpr,
    SOURCE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row, start, count = locate(work_rows, work_chunks, numels, CHUNK_SIZE)
    destination_address, destination, aligned_destination = operand(destination_pointers, row, start, DESTINATION)
    source_address, source, aligned_source = operand(source_pointers, row, start, SOURCE)
    full = full_blocks(destination_address | source_address, count, BLOCK_SIZE)
    copy_chunk(destination, aligned_destination, source, aligned_source, count, full, BLOCK_SIZE)


def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    old_params: Sequence[Tensor],
    norm: Tensor,  # ()
    *,
    rho: float,
    lambd: float,
    adaptive: bool,
    eta: float,
    eps: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    from_old: bool,
) -> None:
    """See :func:`sam_kernels.functional.perturb_`."""
    table = table_of({"params": params, "grads": grads, "old_params": old_params}, "perturb")
    for group in table.groups:
        launch(
            _perturb_kernel,
            group.chunks,
            table.device,
            *table.pointers("params", "grads", "old_params"),
            table.numels,
            group.rows,
            group.chunk_indices,
            norm,
            grad_scale,
            found_inf,
            rho,
            1.0 - lambd,  # in double: it cancels for the lambd close to 1 of the schedule 1 - 1/t
            lambd,
            eps,
            eta,
            PARAM=group.dtypes["params"],
            GRAD=group.dtypes["grads"],
            OLD_PARAM=group.dtypes["old_params"],
            FROM_OLD=from_old,
            ADAPTIVE=adaptive,
            **group.constants,
        )
    written(params)


def restore_(params: Sequence[Tensor], old_params: Sequence[Tensor]) -> None:
    """See :func:`sam_kernels.functional.restore_`."""
    table = table_of({"params": params, "old_params": old_params}, "copy")
    for group in table.groups:
        launch(
            _copy_kernel,
            group.chunks,
            table.device,
            *table.pointers("params", "old_params"),
            table.numels,
            group.rows,
            group.chunk_indices,
            DESTINATION=group.dtypes["params"],
            SOURCE=group.dtypes["old_params"],
            **group.constants,
        )
    written(params)
