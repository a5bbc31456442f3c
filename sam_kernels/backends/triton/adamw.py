"""Restore and ``torch.optim.AdamW`` (or ``Adam``) in one pass, from old_p (where given) to p, with to_old to both.

Specification: ``sam_kernels.reference.adamw_step_``; twin: ``csrc/cpu/adamw.cpp``. float32, bfloat16 and float16 storage in any mix,
float32 arithmetic in the order of ``csrc/common/formulas.h``, one rounding. The step counters lie on the device: a first, tiny launch
advances them (unless the step is skipped) and computes both bias corrections of each row; the second makes the step. Masters that are
written and stochastic rounding of bfloat16 parameters are compiled only where a call has them.
Reads old_p (else p), g, m, v; writes p, m, v: 7 N s bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sam_kernels._tensor_list import TensorList
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
from sam_kernels.backends.triton._launch import launch, single, written
from sam_kernels.backends.triton._lists import describe_list
from sam_kernels.backends.triton._random import seed_key
from sam_kernels.backends.triton._rounding import block_of, for_words, store_weights
from sam_kernels.backends.triton._table import table_of
from sam_kernels.operations import AdamWStep, Operands

__all__ = ["adamw_step_"]

_ROWS = 128  # rows a program of the first launch


@triton.jit
def _split(x):
    """x as a sum of two numbers of 12 significant bits (Veltkamp), so that products of halves are exact."""
    scaled = x * 4097.0
    high = scaled - (scaled - x)
    return high, x - high


@triton.jit
def _multiply(a_high, a_low, b_high, b_low):
    """The product of two numbers of 48 bits, each a sum of two float32 (Dekker); relative error about 2^-45."""
    product = a_high * b_high
    a1, a2 = _split(a_high)
    b1, b2 = _split(b_high)
    error = ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2
    error = error + (a_high * b_low + a_low * b_high)
    high = product + error
    return high, error - (high - product)


@triton.jit
def _one_minus_power(beta_high, beta_low, exponent, bits):
    """1 - beta^exponent. In float32 alone it would lose what beta lacks to 1: 10 of 24 bits for 0.999."""
    high, low = tl.full(exponent.shape, 1.0, tl.float32), tl.zeros(exponent.shape, tl.float32)
    square_high, square_low = high * beta_high, low + beta_low
    left = exponent.to(tl.int32)
    for _ in range(bits):
        next_high, next_low = _multiply(high, low, square_high, square_low)
        high, low = tl.where(left % 2 == 1, next_high, high), tl.where(left % 2 == 1, next_low, low)
        square_high, square_low = _multiply(square_high, square_low, square_high, square_low)
        left = left // 2
    return (1.0 - high) - low


@triton.jit
def _advance_kernel(
    step_pointers,  # (R,) int64
    step_sizes,  # (R,) float32
    inv_sqrt_corrections,  # (R,) float32
    norm,  # () float32 or None
    found_inf,  # () float32 or None
    count,  # R
    lr,  # number or () floating point
    beta1_high,
    beta1_low,
    beta2_high,
    beta2_low,
    BLOCK_SIZE: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = rows < count
    step = tl.load(step_pointers + rows, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    t = tl.load(step, mask=mask, other=0.0)
    if not is_skipped(norm, found_inf):
        t += 1.0
        tl.store(step, t, mask=mask)
        bits = 0
        left = tl.max(t).to(tl.int32)
        while left > 0:
            bits += 1
            left = left // 2
        correction1 = _one_minus_power(beta1_high, beta1_low, t, bits)
        correction2 = _one_minus_power(beta2_high, beta2_low, t, bits)
        tl.store(step_sizes + rows, tl.div_rn(tl.zeros_like(t) + load_number(lr).to(tl.float32), correction1), mask=mask)
        tl.store(inv_sqrt_corrections + rows, tl.div_rn(tl.zeros_like(t) + 1.0, tl.sqrt_rn(correction2)), mask=mask)


@triton.jit
def _adamw_words(
    param, grad, source, exp_avg, exp_avg_sq, offsets, count, word,
    step_size, inv_sqrt_correction, exp_avg_factor, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, decay_factor, multiplier,
    DECAY: tl.constexpr, TO_OLD: tl.constexpr, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    p = load_float(source, offsets, count, MASKED)
    g = load_float(grad, offsets, count, MASKED) * multiplier
    if DECAY == "l2":
        g = g + weight_decay * p
    if DECAY == "decoupled":
        p = p * decay_factor
    m = load_float(exp_avg, offsets, count, MASKED)
    m = m * exp_avg_factor + one_minus_beta1 * tl.where(exp_avg_factor == 1.0, g - m, g)
    store(exp_avg, offsets, count, m, MASKED)
    v = load_float(exp_avg_sq, offsets, count, MASKED) * beta2 + one_minus_beta2 * g * g
    store(exp_avg_sq, offsets, count, v, MASKED)
    denominator = tl.sqrt_rn(v) * inv_sqrt_correction + eps
    p = p - step_size * tl.div_rn(m, denominator)
    store_weights(param, source, offsets, count, p, word, TO_OLD, STOCHASTIC, MASKED)


@triton.jit
def _adamw_block(
    param, grad, source, exp_avg, exp_avg_sq, block, count, start, row, key_low, key_high,
    step_size, inv_sqrt_correction, exp_avg_factor, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, decay_factor, multiplier,
    DECAY: tl.constexpr, TO_OLD: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for_words(
        _adamw_words, (param, grad, source, exp_avg, exp_avg_sq), block, count, start, row, key_low, key_high,
        (
            step_size, inv_sqrt_correction, exp_avg_factor, one_minus_beta1, beta2, one_minus_beta2, eps,
            weight_decay, decay_factor, multiplier, DECAY, TO_OLD,
        ),
        STOCHASTIC, BLOCK_SIZE, MASKED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _adamw_kernel(
    param_pointers,  # (R,) int64
    grad_pointers,  # (R,) int64
    old_param_pointers,  # (R,) int64, None: the step is made in place
    exp_avg_pointers,  # (R,) int64
    exp_avg_sq_pointers,  # (R,) int64
    numels,  # (R,) int64
    work_rows,  # (C,) int32
    work_chunks,  # (C,) int32
    chunk_size,  # elements
    row_indices,  # (R,) int32: the caller's numbers of the rows, None where they are the same
    step_sizes,  # (R,) float32: lr / (1 - beta1^t)
    inv_sqrt_corrections,  # (R,) float32: 1 / sqrt(1 - beta2^t)
    norm,  # () float32 or None
    grad_scale,  # () float32 or None
    found_inf,  # () float32 or None
    max_norm,  # number or None
    exp_avg_factor,  # 1 from beta1 = 1/2 on, beta1 below: average_factor of csrc/common/formulas.h
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    weight_decay,
    decay_factor,  # number: 1 - lr weight_decay; None: lr is no number
    lr,  # () floating point, None: a number
    key_low,
    key_high,
    DTYPES: tl.constexpr,
    DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    TO_OLD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row, start, count, full, plain, aligned = take_chunk(
        (param_pointers, grad_pointers, old_param_pointers, exp_avg_pointers, exp_avg_sq_pointers),
        numels, work_rows, work_chunks, chunk_size, DTYPES, BLOCK_SIZE,
    )  # fmt: skip
    if is_skipped(norm, found_inf):
        if old_param_pointers is not None:
            for_blocks(copy_block, (plain[0], plain[2]), (aligned[0], aligned[2]), full, count, (), BLOCK_SIZE)
    else:
        multiplier = grad_multiplier(grad_scale, norm, max_norm, MAXIMIZE)
        factor = decay_factor
        if decay_factor is None:
            factor = (1.0 - load_number(lr) * weight_decay).to(tl.float32)
        step_size = tl.load(step_sizes + row)
        inv_sqrt_correction = tl.load(inv_sqrt_corrections + row)
        index = row
        if row_indices is not None:
            index = tl.load(row_indices + row)
        for_blocks(
            _adamw_block, plain, aligned, full, count,
            (
                start, index, key_low, key_high,
                step_size, inv_sqrt_correction, exp_avg_factor, one_minus_beta1, beta2, one_minus_beta2, eps,
                weight_decay, factor, multiplier, DECAY, TO_OLD, STOCHASTIC,
            ),
            BLOCK_SIZE,
        )  # fmt: skip


def adamw_step_(op: AdamWStep, lists: Operands) -> bool:  # always True: whether the step was made only the device knows
    """See :func:`sam_kernels.functional.adamw_step_`. Step counters that are not float32 on the parameters' device make it wait."""
    state_steps = lists["state_steps"]
    usual = _are_float32_on(state_steps, lists.device)
    steps = state_steps if usual else [step.to(lists.device, torch.float32, copy=True) for step in state_steps]
    is_rounded = op.rounding_seed is not None
    operands = {role: tensors for role, tensors in lists.items() if role != "state_steps"}
    table = table_of(operands, "random" if is_rounded else "adamw")
    corrections = _advance(op, steps)
    decay = "none" if op.weight_decay == 0.0 else "decoupled" if op.decoupled else "l2"
    for group in table.groups:
        stochastic = is_rounded and group.dtypes["params"] == tl.bfloat16
        table.launch(
            _adamw_kernel,
            group,
            ("params", "grads", "old_params", "exp_avgs", "exp_avg_sqs"),
            table.row_indices(lists.indices) if stochastic else None,
            *corrections,
            single(op.norm),
            single(op.grad_scale),
            single(op.found_inf),
            op.max_norm,
            op.betas[0] if op.betas[0] < 0.5 else 1.0,
            1.0 - op.betas[0],
            op.betas[1],
            1.0 - op.betas[1],
            op.eps,
            op.weight_decay,
            None if isinstance(op.lr, Tensor) else 1.0 - op.lr * op.weight_decay,
            op.lr if isinstance(op.lr, Tensor) else None,
            *seed_key(op.rounding_seed or 0),
            DECAY=decay,
            MAXIMIZE=op.maximize,
            TO_OLD=op.to_old,
            STOCHASTIC=stochastic,
            BLOCK_SIZE=block_of(group, "adamw", stochastic),
        )
    written(lists["params"])
    if op.to_old:
        written(lists["old_params"])
    if steps is not state_steps:
        for step, advanced in zip(state_steps, steps, strict=True):
            step.copy_(advanced)
    return True


def _are_float32_on(steps: Sequence[Tensor], device: torch.device) -> bool:
    if isinstance(steps, TensorList) and "triton" in steps.descriptions:
        described = describe_list(steps)
        return described.device == device and described.contents.only_float32
    return all(step.device == device and step.dtype is torch.float32 for step in steps)


def _advance(op: AdamWStep, steps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:  # (R,), (R,) float32
    """Adds one to every step counter, unless skipped: step sizes and corrections of each row."""
    table = table_of({"state_steps": steps}, "steps")
    step_sizes, inv_sqrt_corrections = table.corrections
    launch(
        _advance_kernel,
        -(-table.count // _ROWS),
        table.device,
        *table.pointers("state_steps"),
        step_sizes,
        inv_sqrt_corrections,
        single(op.norm),
        single(op.found_inf),
        table.count,
        op.lr,
        *_two_floats(op.betas[0]),
        *_two_floats(op.betas[1]),
        BLOCK_SIZE=_ROWS,
    )
    return step_sizes, inv_sqrt_corrections


def _two_floats(number: float) -> tuple[float, float]:
    """A number as the sum of two float32."""
    high = ctypes.c_float(number).value
    return high, ctypes.c_float(number - high).value
