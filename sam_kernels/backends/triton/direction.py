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

from sam_kernels.backends.triton._blocks import inverse_of, load_float, store, take_chunk
from sam_kernels.backends.triton._finish import Finish, finish_in_last_program, launch_sums, store_sum
from sam_kernels.backends.triton._launch import single
from sam_kernels.backends.triton._sums import add_squares, join_kinds, sum_chunk, weighted
from sam_kernels.backends.triton._table import table_of
from sam_kernels.operations import DirectionNorm, Operands

__all__ = ["direction_norm_"]


@triton.jit
def _direction_block(
    grad, ema, param, offsets, count, inverse, decay, gain, sigma, eta,
    FRIENDLY: tl.constexpr, FIRST_STEP: tl.constexpr, ADAPTIVE: tl.constexpr, sums, MASKED: tl.constexpr,
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
    return add_squares(weighted(d, param, offsets, count, eta, ADAPTIVE, MASKED), sums)


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
    DTYPES: tl.constexpr,
    FRIENDLY: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FINISH_SIZE: tl.constexpr,
):
    _, _, count, full, plain, aligned = take_chunk(
        (grad_pointers, ema_pointers, param_pointers), numels, work_rows, work_chunks, chunk_size, DTYPES, BLOCK_SIZE
    )
    medium, big, small = sum_chunk(
        _direction_block, plain, aligned, full, count,
        (inverse_of(grad_scale), decay, gain, sigma, eta, FRIENDLY, FIRST_STEP, param_pointers is not None), BLOCK_SIZE,
    )  # fmt: skip
    total, kind = join_kinds(medium, big, small)
    store_sum(total, kind, work_slots, sums, kinds)
    finish_in_last_program(sums, kinds, counter, bounds, norm, found_inf, skipped, FINISH_SIZE)


def direction_norm_(op: DirectionNorm, lists: Operands) -> Tensor:  # () float32
    """See :func:`sam_kernels.functional.direction_norm_`."""
    table = table_of(lists, "direction")
    norm = torch.empty(1, dtype=torch.float32, device=table.device)
    finish = Finish(table, (table.count,), norm, None, None)
    for group in table.groups:
        launch_sums(
            _direction_kernel,
            table,
            group,
            ("grads", "ema", "params"),
            finish.arguments(group),
            single(op.grad_scale),
            op.decay,
            op.gain,
            op.sigma,
            op.eta,
            FRIENDLY=op.kind == "friendly" and not op.first_step,
            FIRST_STEP=op.first_step,
        )
    finish.launch_rest()
    return norm[0]
