"""Restore and ``torch.optim.SGD`` in one pass: the step is made from old_p (where given) and written to p.

Specification: ``sam_kernels.reference.sgd_step_``; twin: ``csrc/cpu/sgd.cpp``. float32, bfloat16 and float16 storage in any mix, float32
arithmetic in the order of ``csrc/common/formulas.h``, one rounding. 1 / grad_scale, the clip factor and the sign of maximize multiply the
gradient; all come from device memory, and lr does where it is no number. Where the step is skipped parameters are restored and nothing else
happens.
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
from sam_kernels.backends.triton._table import table_of
from sam_kernels.operations import Operands, SgdStep

__all__ = ["sgd_step_"]


@triton.jit
def _sgd_block(
    param, grad, source, buffer, block, count, lr, momentum, one_minus_dampening, weight_decay, multiplier,
    MOMENTUM: tl.constexpr, FIRST_STEP: tl.constexpr, NESTEROV: tl.constexpr, WEIGHT_DECAY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    offsets = block + tl.arange(0, BLOCK_SIZE)
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
    store(param, offsets, count, p - lr * update, MASKED)


@triton.jit
def _sgd_kernel(
    param_pointers,  # (R,) int64
    grad_pointers,  # (R,) int64
    old_param_pointers,  # (R,) int64, None: the step is made in place
    buffer_pointers,  # (R,) int64, None without momentum
    numels,  # (R,) int64
    work_rows,  # (C,) int32
    work_chunks,  # (C,) int32
    chunk_size,  # elements
    norm,  # () float32 or None
    grad_scale,  # () float32 or None
    found_inf,  # () float32 or None
    max_norm,  # number or None
    lr,  # number or () floating point
    momentum,
    one_minus_dampening,
    weight_decay,
    DTYPES: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    NESTEROV: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    _, _, count, full, plain, aligned = take_chunk(
        (param_pointers, grad_pointers, old_param_pointers, buffer_pointers),
        numels, work_rows, work_chunks, chunk_size, DTYPES, BLOCK_SIZE,
    )  # fmt: skip
    if is_skipped(norm, found_inf):
        if old_param_pointers is not None:
            for_blocks(copy_block, (plain[0], plain[2]), (aligned[0], aligned[2]), full, count, (), BLOCK_SIZE)
    else:
        multiplier = grad_multiplier(grad_scale, norm, max_norm, MAXIMIZE)
        rate = load_number(lr).to(tl.float32)
        for_blocks(
            _sgd_block, plain, aligned, full, count,
            (
                rate, momentum, one_minus_dampening, weight_decay, multiplier,
                buffer_pointers is not None, FIRST_STEP, NESTEROV, WEIGHT_DECAY,
            ),
            BLOCK_SIZE,
        )  # fmt: skip


def sgd_step_(op: SgdStep, lists: Operands) -> bool:  # always True: whether the step was made only the device knows
    """See :func:`sam_kernels.functional.sgd_step_`."""
    table = table_of(lists, "sgd")
    for group in table.groups:
        table.launch(
            _sgd_kernel,
            group,
            ("params", "grads", "old_params", "momentum_buffers"),
            single(op.norm),
            single(op.grad_scale),
            single(op.found_inf),
            op.max_norm,
            op.lr,
            op.momentum,
            1.0 - op.dampening,
            op.weight_decay,
            FIRST_STEP=op.first_step,
            NESTEROV=op.nesterov,
            WEIGHT_DECAY=op.weight_decay != 0.0,
            MAXIMIZE=op.maximize,
        )
    written(lists["params"])
    return True
