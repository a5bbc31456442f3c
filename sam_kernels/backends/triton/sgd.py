"""Restore and ``torch.optim.SGD`` in one pass: the step is made from old_p (where given) and written to p, with to_old to both.

Specification: ``sam_kernels.reference.sgd_step_``; twin: ``csrc/cpu/sgd.cpp``. float32, bfloat16 and float16 storage in any mix, float32
arithmetic in the order of ``csrc/common/formulas.h``, one rounding. 1 / grad_scale, the clip factor and the sign of maximize multiply the
gradient; all come from device memory, and lr does where it is no number. Where the step is skipped parameters are restored and nothing else
happens. Masters that are written and stochastic rounding of bfloat16 parameters are compiled only where a call has them.
Reads old_p (else p), g, m; writes p, m: 5 N s bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sam_kernels.backends.triton._blocks import (
    copy_block,
    for_blocks,
    grad_multiplier,
    is_skipped,
    load_float,
    load_number,
    store,
    take_chunk,
)
from sam_kernels.backends.triton._launch import single, written
from sam_kernels.backends.triton._random import seed_key
from sam_kernels.backends.triton._rounding import block_of, for_words, store_weights
from sam_kernels.backends.triton._table import table_of
from sam_kernels.operations import Operands, SgdStep

__all__ = ["sgd_step_"]


@triton.jit
def _sgd_words(
    param, grad, source, buffer, offsets, count, word, lr, momentum, one_minus_dampening, weight_decay, multiplier,
    MOMENTUM: tl.constexpr, FIRST_STEP: tl.constexpr, NESTEROV: tl.constexpr, WEIGHT_DECAY: tl.constexpr,
    TO_OLD: tl.constexpr, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    p = load_float(source, offsets, count, MASKED)
    update = load_float(grad, offsets, count, MASKED) * multiplier
    if WEIGHT_DECAY:
        update = update + weight_decay * p
    if MOMENTUM:
        if FIRST_STEP:
            m = update  # no dampening on the first step, as torch
        else:
            m = load_float(buffer, offsets, count, MASKED) * momentum + update * one_minus_dampening
        store(buffer, offsets, count, m, MASKED)
        if NESTEROV:
            update = update + momentum * m
        else:
            update = m
    store_weights(param, source, offsets, count, p - lr * update, word, TO_OLD, STOCHASTIC, MASKED)


@triton.jit
def _sgd_block(
    param, grad, source, buffer, block, count, start, row, key_low, key_high,
    lr, momentum, one_minus_dampening, weight_decay, multiplier,
    MOMENTUM: tl.constexpr, FIRST_STEP: tl.constexpr, NESTEROV: tl.constexpr, WEIGHT_DECAY: tl.constexpr,
    TO_OLD: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for_words(
        _sgd_words, (param, grad, source, buffer), block, count, start, row, key_low, key_high,
        (lr, momentum, one_minus_dampening, weight_decay, multiplier, MOMENTUM, FIRST_STEP, NESTEROV, WEIGHT_DECAY, TO_OLD),
        STOCHASTIC, BLOCK_SIZE, MASKED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _sgd_kernel(
    param_pointers,  # (R,) int64
    grad_pointers,  # (R,) int64
    old_param_pointers,  # (R,) int64, None: the step is made in place
    buffer_pointers,  # (R,) int64, None without momentum
    numels,  # (R,) int64
    work_rows,  # (C,) int32
    work_chunks,  # (C,) int32
    chunk_size,  # elements
    row_indices,  # (R,) int32: the caller's numbers of the rows, None where they are the same
    norm,  # () float32 or None
    grad_scale,  # () float32 or None
    found_inf,  # () float32 or None
    max_norm,  # number or None
    lr,  # number or () floating point
    momentum,
    one_minus_dampening,
    weight_decay,
    key_low,
    key_high,
    DTYPES: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    NESTEROV: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    TO_OLD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row, start, count, full, plain, aligned = take_chunk(
        (param_pointers, grad_pointers, old_param_pointers, buffer_pointers),
        numels, work_rows, work_chunks, chunk_size, DTYPES, BLOCK_SIZE,
    )  # fmt: skip
    if is_skipped(norm, found_inf):
        if old_param_pointers is not None:
            for_blocks(copy_block, (plain[0], plain[2]), (aligned[0], aligned[2]), full, count, (), BLOCK_SIZE)
    else:
        multiplier = grad_multiplier(grad_scale, norm, max_norm, MAXIMIZE)
        rate = load_number(lr).to(tl.float32)
        index = row
        if row_indices is not None:
            index = tl.load(row_indices + row)
        for_blocks(
            _sgd_block, plain, aligned, full, count,
            (
                start, index, key_low, key_high, rate, momentum, one_minus_dampening, weight_decay, multiplier,
                buffer_pointers is not None, FIRST_STEP, NESTEROV, WEIGHT_DECAY, TO_OLD, STOCHASTIC,
            ),
            BLOCK_SIZE,
        )  # fmt: skip


def sgd_step_(op: SgdStep, lists: Operands) -> bool:  # always True: whether the step was made only the device knows
    """See :func:`sam_kernels.functional.sgd_step_`."""
    is_rounded = op.rounding_seed is not None
    table = table_of(lists, "random" if is_rounded else "sgd")
    for group in table.groups:
        stochastic = is_rounded and group.dtypes["params"] == tl.bfloat16
        table.launch(
            _sgd_kernel,
            group,
            ("params", "grads", "old_params", "momentum_buffers"),
            table.row_indices(lists.indices) if stochastic else None,
            single(op.norm),
            single(op.grad_scale),
            single(op.found_inf),
            op.max_norm,
            op.lr,
            op.momentum,
            1.0 - op.dampening,
            op.weight_decay,
            *seed_key(op.rounding_seed or 0),
            FIRST_STEP=op.first_step,
            NESTEROV=op.nesterov,
            WEIGHT_DECAY=op.weight_decay != 0.0,
            MAXIMIZE=op.maximize,
            TO_OLD=op.to_old,
            STOCHASTIC=stochastic,
            BLOCK_SIZE=block_of(group, "sgd", stochastic),
        )
    written(lists["params"])
    if op.to_old:
        written(lists["old_params"])
    return True
