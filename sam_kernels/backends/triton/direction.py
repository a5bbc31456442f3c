"""Moving averages of gradients, and the norm of the direction made with them, in one pass.

Specification: ``sam_kernels.reference.direction_norm_``; twin: ``csrc/cpu/direction.cpp``. VaSSO (arXiv 2309.15639) and Friendly SAM (arXiv
2403.12350). float32, bfloat16 and float16 storage in any mix, float32 arithmetic, one rounding of m; sums as in ``norm.py``, except that a
chunk cannot be read twice once m is written: each term goes at once into the sum of its size.
Reads g, m (and p when adaptive); writes m: 3 N s bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sam_kernels.backends.triton._blocks import full_blocks, inverse_of, load_float, locate, operand, store
from sam_kernels.backends.triton._config import FINISH_BLOCK
from sam_kernels.backends.triton._finish import Finish, store_sum
from sam_kernels.backends.triton._launch import launch, single
from sam_kernels.backends.triton._squares import add_squares, join_kinds
from sam_kernels.backends.triton._table import table_of
from sam_kernels.operations import DirectionNorm, Operands

__all__ = ["direction_norm_"]


@triton.jit
def _direction_block(
    grad, ema, param, offsets, count, inverse, decay, gain, sigma, eta, medium, big, small,
    FRIENDLY: tl.constexpr, FIRST_STEP: tl.constexpr, ADAPTIVE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    g = load_float(grad, offsets, count, MASKED) * inverse
    if FIRST_STEP:
        before = tl.zeros_like(g)
        after = g
    else:
        before = load_float(ema, offsets, count, MASKED)
        after = before * decay + g * gain
    # One step that is skipped must not poison those after it.
    store(ema, offsets, count, tl.where(g - g == 0.0, after, before), MASKED)
    d = after
    if FRIENDLY:
        d = g - sigma * before
    if ADAPTIVE:
        d = (tl.abs(load_float(param, offsets, count, MASKED)) + eta) * d
    return add_squares(d, medium, big, small)


@triton.jit
def _direction_sums(
    grad, ema, param, begin, end, count, inverse, decay, gain, sigma, eta,
    FRIENDLY: tl.constexpr, FIRST_STEP: tl.constexpr, ADAPTIVE: tl.constexpr, BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, BLOCK_SIZE)
    medium = tl.zeros([BLOCK_SIZE], tl.float32)
    big = tl.zeros([BLOCK_SIZE], tl.float32)
    small = tl.zeros([BLOCK_SIZE], tl.float32)
    for block in range(begin, end, BLOCK_SIZE):
        medium, big, small = _direction_block(
            grad, ema, param, block + offsets, count, inverse, decay, gain, sigma, eta, medium, big, small,
            FRIENDLY, FIRST_STEP, ADAPTIVE, MASKED,
        )  # fmt: skip
    return tl.sum(medium), tl.sum(big), tl.sum(small)


@triton.jit
def _direction_kernel(
    grad_pointers,  # (R,) int64
    ema_pointers,  # (R,) int64
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
    norm,  # () float32 or None
    found_inf,  # None
    skipped,  # None
    grad_scale,  # () float32 or None
    decay,
    gain,
    sigma,
    eta,
    GRAD: tl.constexpr,
    EMA: tl.constexpr,
    PARAM: tl.constexpr,
    FRIENDLY: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FINISH_SIZE: tl.constexpr,
):
    row, start, count = locate(work_rows, work_chunks, chunk_size, numels)
    grad_address, grad, aligned_grad = operand(grad_pointers, row, start, GRAD)
    ema_address, ema, aligned_ema = operand(ema_pointers, row, start, EMA)
    addresses = grad_address | ema_address
    param, aligned_param = grad, aligned_grad
    ADAPTIVE: tl.constexpr = param_pointers is not None
    if ADAPTIVE:
        param_address, param, aligned_param = operand(param_pointers, row, start, PARAM)
        addresses = addresses | param_address
    full = full_blocks(addresses, count, BLOCK_SIZE)
    inverse = inverse_of(grad_scale)
    HALF: tl.constexpr = BLOCK_SIZE // 2  # of the masked blocks: see _blocks.py
    medium_sum, big_sum, small_sum = _direction_sums(
        aligned_grad, aligned_ema, aligned_param, 0, full, count, inverse, decay, gain, sigma, eta,
        FRIENDLY, FIRST_STEP, ADAPTIVE, BLOCK_SIZE, False,
    )  # fmt: skip
    medium_rest, big_rest, small_rest = _direction_sums(
        grad, ema, param, full, count, count, inverse, decay, gain, sigma, eta, FRIENDLY, FIRST_STEP, ADAPTIVE, HALF, True
    )
    total, kind = join_kinds(medium_sum + medium_rest, big_sum + big_rest, small_sum + small_rest)
    slot = tl.load(work_slots + tl.program_id(0))
    store_sum(total, kind, slot, sums, kinds, counter, bounds, norm, found_inf, skipped, FINISH_SIZE)


def direction_norm_(op: DirectionNorm, lists: Operands) -> Tensor:  # () float32
    """See :func:`sam_kernels.functional.direction_norm_`."""
    table = table_of(lists, "direction")
    norm = torch.empty(1, dtype=torch.float32, device=table.device)
    finish = Finish(table, (table.count,), norm, None, None)
    for group in table.groups:
        launch(
            _direction_kernel,
            group.chunks,
            table.device,
            *table.arguments(group, "grads", "ema", "params"),
            group.slots,
            *table.sums,
            *finish.arguments(group),
            single(op.grad_scale),
            op.decay,
            op.gain,
            op.sigma,
            op.eta,
            GRAD=group.dtypes["grads"],
            EMA=group.dtypes["ema"],
            PARAM=group.dtypes["params"],
            FRIENDLY=op.kind == "friendly" and not op.first_step,
            FIRST_STEP=op.first_step,
            FINISH_SIZE=FINISH_BLOCK,
            **group.constants,
        )
    finish.launch_rest()
    return norm[0]
