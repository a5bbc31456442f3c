"""The ascent: old_p <- p, p <- p + s g, or p + s T_w^2 g with T_w = |p| + eta when adaptive; and the copy that takes it back.

Specification: ``sam_kernels.reference.perturb_``; twin: ``csrc/cpu/perturb.cpp``. float32, bfloat16 and float16 storage in any mix, float32
arithmetic, one rounding. The scale s = rho (1 - lambd + lambd / (norm / grad_scale + eps)) / grad_scale is computed by every program from
scalars in device memory, so the host never waits; rho and lambd are numbers or lie there too. Where the step is skipped parameters are only
saved (from_old: restored). Few ask for a direction made with a moving average m, or for stochastic rounding of bfloat16 parameters: both
are compiled only then.
Reads p, g; writes old_p, p: 4 N s bytes (from_old: reads old_p, g; writes p: 3 N s), and m. Restoring: 2 N s.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sam_kernels.backends.triton._blocks import (
    convert,
    copy_block,
    for_blocks,
    inverse_of,
    is_skipped,
    load,
    load_float,
    load_number,
    store,
    take_chunk,
)
from sam_kernels.backends.triton._config import CONFIGS
from sam_kernels.backends.triton._launch import single, written
from sam_kernels.backends.triton._random import seed_key
from sam_kernels.backends.triton._rounding import for_words, stochastic_bfloat16
from sam_kernels.backends.triton._table import table_of
from sam_kernels.operations import Operands, Perturb, Restore

__all__ = ["perturb_", "restore_"]


@triton.jit
def _direction(grad, ema, offsets, count, grad_weight, ema_weight, USES_GRAD: tl.constexpr, USES_EMA: tl.constexpr, MASKED: tl.constexpr):
    if not USES_EMA:
        return load_float(grad, offsets, count, MASKED)
    elif not USES_GRAD:  # not multiplied by 0: it may not be finite
        return load_float(ema, offsets, count, MASKED) * ema_weight
    else:
        return load_float(grad, offsets, count, MASKED) * grad_weight + load_float(ema, offsets, count, MASKED) * ema_weight


@triton.jit
def _perturb_words(
    param, old_param, grad, ema, offsets, count, word, scale, eta, grad_weight, ema_weight,
    USES_GRAD: tl.constexpr, USES_EMA: tl.constexpr, FROM_OLD: tl.constexpr, ADAPTIVE: tl.constexpr,
    STOCHASTIC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    d = _direction(grad, ema, offsets, count, grad_weight, ema_weight, USES_GRAD, USES_EMA, MASKED)
    if FROM_OLD:
        p = load_float(old_param, offsets, count, MASKED)
    else:
        stored = load(param, offsets, count, MASKED)
        store(old_param, offsets, count, stored, MASKED)
        p = convert(stored, tl.float32)
    if ADAPTIVE:
        weight = tl.abs(p) + eta
        d = weight * weight * d
    moved = p + d * scale
    if STOCHASTIC:
        moved = stochastic_bfloat16(moved, word)
    store(param, offsets, count, moved, MASKED)


@triton.jit
def _perturb_block(
    param, old_param, grad, ema, block, count, start, row, key_low, key_high, scale, eta, grad_weight, ema_weight,
    USES_GRAD: tl.constexpr, USES_EMA: tl.constexpr, FROM_OLD: tl.constexpr, ADAPTIVE: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for_words(
        _perturb_words, (param, old_param, grad, ema), block, count, start, row, key_low, key_high,
        (scale, eta, grad_weight, ema_weight, USES_GRAD, USES_EMA, FROM_OLD, ADAPTIVE),
        STOCHASTIC, BLOCK_SIZE, MASKED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _perturb_kernel(
    param_pointers,  # (R,) int64
    old_param_pointers,  # (R,) int64
    grad_pointers,  # (R,) int64, None where the direction does without
    ema_pointers,  # (R,) int64, None where the direction is the gradient
    numels,  # (R,) int64
    work_rows,  # (C,) int32
    work_chunks,  # (C,) int32
    chunk_size,  # elements
    row_indices,  # (R,) int32: the caller's numbers of the rows, None where they are the same
    norm,  # () float32
    grad_scale,  # () float32 or None
    found_inf,  # () float32 or None
    rho,  # number or () floating point
    one_minus_lambd,  # number, None: lambd is no number
    lambd,  # number or () floating point
    eps,
    eta,
    grad_weight,
    ema_weight,
    key_low,
    key_high,
    DTYPES: tl.constexpr,
    FROM_OLD: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    USES_GRAD: tl.constexpr = grad_pointers is not None
    USES_EMA: tl.constexpr = ema_pointers is not None
    row, start, count, full, plain, aligned = take_chunk(
        (param_pointers, old_param_pointers, grad_pointers, ema_pointers),
        numels, work_rows, work_chunks, chunk_size, DTYPES, BLOCK_SIZE,
    )  # fmt: skip
    if is_skipped(norm, found_inf):
        if FROM_OLD:
            for_blocks(copy_block, (plain[0], plain[1]), (aligned[0], aligned[1]), full, count, (), BLOCK_SIZE)
        else:
            for_blocks(copy_block, (plain[1], plain[0]), (aligned[1], aligned[0]), full, count, (), BLOCK_SIZE)
    else:
        inverse = inverse_of(grad_scale)
        mix = load_number(lambd)
        rest = one_minus_lambd
        if one_minus_lambd is None:
            rest = (1.0 - mix).to(tl.float32)  # in the precision of lambd, for it cancels
        radius, mix = load_number(rho).to(tl.float32), mix.to(tl.float32)
        scale = tl.load(norm).to(tl.float32)
        if USES_EMA:  # a direction is unscaled, and so is its norm
            scale = radius * (rest + tl.div_rn(mix, scale + eps))
        else:
            scale = radius * (rest + tl.div_rn(mix, scale * inverse + eps)) * inverse
        index = row
        if row_indices is not None:
            index = tl.load(row_indices + row)
        for_blocks(
            _perturb_block, plain, aligned, full, count,
            (
                start, index, key_low, key_high, scale, eta, grad_weight * inverse, ema_weight,
                USES_GRAD, USES_EMA, FROM_OLD, ADAPTIVE, STOCHASTIC,
            ),
            BLOCK_SIZE,
        )  # fmt: skip


@triton.jit
def _copy_kernel(
    destination_pointers,  # (R,) int64
    source_pointers,  # (R,) int64
    numels,  # (R,) int64
    work_rows,  # (C,) int32
    work_chunks,  # (C,) int32
    chunk_size,  # elements
    DTYPES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    _, _, count, full, plain, aligned = take_chunk(
        (destination_pointers, source_pointers), numels, work_rows, work_chunks, chunk_size, DTYPES, BLOCK_SIZE
    )
    for_blocks(copy_block, plain, aligned, full, count, (), BLOCK_SIZE)


def perturb_(op: Perturb, lists: Operands) -> None:
    """See :func:`sam_kernels.functional.perturb_`."""
    uses_ema, is_rounded = "ema" in lists, op.rounding_seed is not None
    uses_grads = not uses_ema or op.grad_weight != 0.0
    table = table_of(lists if uses_grads else {**lists, "grads": None}, "random" if is_rounded else "perturb")
    for group in table.groups:
        stochastic = is_rounded and group.dtypes["params"] == tl.bfloat16
        # Only the rows that are rounded so need blocks of whole random tiles; one more operand, and registers would cost occupancy.
        block, most = group.constants["BLOCK_SIZE"], CONFIGS["perturb"].block // (2 if uses_ema else 1)
        block = block if stochastic else min(block, most)
        table.launch(
            _perturb_kernel,
            group,
            ("params", "old_params", "grads", "ema"),
            table.row_indices(lists.indices) if is_rounded else None,
            single(op.norm),
            single(op.grad_scale),
            single(op.found_inf),
            op.rho,
            None if isinstance(op.lambd, Tensor) else 1.0 - op.lambd,  # in double: it cancels for a lambd close to 1, as of 1 - 1/t
            op.lambd,
            op.eps,
            op.eta,
            op.grad_weight,
            op.ema_weight,
            *seed_key(op.rounding_seed or 0),
            FROM_OLD=op.from_old,
            ADAPTIVE=op.adaptive,
            STOCHASTIC=stochastic,
            BLOCK_SIZE=block,
        )
    written(lists["params"])


def restore_(op: Restore, lists: Operands) -> None:
    """See :func:`sam_kernels.functional.restore_`."""
    table = table_of(lists, "copy")
    for group in table.groups:
        table.launch(_copy_kernel, group, ("params", "old_params"))
    written(lists["params"])
