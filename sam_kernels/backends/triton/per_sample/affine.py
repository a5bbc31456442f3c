"""Gradients of scales and shifts: sums of x g and of g over positions, for every group and channel, both in one pass.

Specification: ``sam_kernels.reference.per_sample.affine_grads_``. float32, bfloat16 and float16 in any mix, float32 sums in a fixed order
without atomics. Reads x and g once: 2 M S C L s bytes. Where groups and channels make too few programs to keep the memory busy, positions
are split among several, and a second kernel adds up what they found.

Two layouts, two kernels: channels innermost (L = 1), where a thread adds up columns; and channels in the middle, where a row of L elements
is a channel's.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language import core

from sam_kernels.backends.triton._blocks import load_where
from sam_kernels.backends.triton.per_sample._config import ENOUGH, TILE_ELEMENTS
from sam_kernels.backends.triton.per_sample._launch import launch

__all__ = ["affine_grads_"]

_BUSY = 4 * ENOUGH  # programs of 128 threads: eight a multiprocessor, 1024 threads with 64 bytes under way each (docs/kernels.md)
_STEPS = 4  # of a program's loop at least, or the second kernel would have more to do than it is worth
_COLUMNS = 128  # channels a program: 512 bytes of a row of float32
_LONG_ROW = 512
_TILE = TILE_ELEMENTS // 2  # of each operand: with 16 a thread of both, registers would cost occupancy
_BLOCK = 512  # sums that a program of the second kernel adds up


@triton.jit
def _add(weight_sums, bias_sums, normalized, grads, place, mask):
    g = load_where(grads, place, mask)
    if normalized is not None:
        weight_sums = tl.fma(load_where(normalized, place, mask), g, weight_sums)
    return weight_sums, bias_sums + g


@triton.jit
def _store_sums(parts, sums, target, mask, AXIS: tl.constexpr):
    if parts is not None:
        tl.store(parts + target, tl.sum(sums, axis=AXIS), mask=mask)


@triton.jit(do_not_specialize=["groups", "positions", "steps", "parts"])
def _columns_kernel(
    weight_parts,  # (parts, M, C) float32 or None
    bias_parts,  # (parts, M, C) float32 or None
    normalized,  # (M, S, C) or None
    grads,  # (M, S, C)
    groups,
    positions,
    channels,
    steps,  # of BLOCK_S positions, for each part
    parts,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    part, rest = program % parts, program // parts
    across = tl.cdiv(channels, BLOCK_C)
    group = (rest // across).to(tl.int64)
    columns = rest % across * BLOCK_C + tl.arange(0, BLOCK_C)
    is_column = columns < channels
    lanes = tl.arange(0, BLOCK_S)
    weight_sums = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    bias_sums = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    first = part * steps * BLOCK_S
    for s in range(first, tl.minimum(first + steps * BLOCK_S, positions), BLOCK_S):
        rows = s + lanes
        place = (group * positions + rows)[:, None] * channels + columns[None, :]
        mask = (rows < positions)[:, None] & is_column[None, :]
        weight_sums, bias_sums = _add(weight_sums, bias_sums, normalized, grads, place, mask)
    target = (part.to(tl.int64) * groups + group) * channels + columns
    _store_sums(weight_parts, weight_sums, target, is_column, 0)
    _store_sums(bias_parts, bias_sums, target, is_column, 0)


@triton.jit(do_not_specialize=["groups", "blocks", "steps", "parts"])
def _rows_kernel(
    weight_parts,  # (parts, M, C) float32 or None
    bias_parts,  # (parts, M, C) float32 or None
    normalized,  # (M, S, C, L) or None
    grads,  # (M, S, C, L)
    groups,
    channels,
    length,
    blocks,  # S times the blocks of a row
    steps,  # of these blocks, for each part
    parts,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    program = tl.program_id(0)
    part, rest = program % parts, program // parts
    across, along = tl.cdiv(channels, BLOCK_C), tl.cdiv(length, BLOCK_L)
    group = (rest // across).to(tl.int64)
    rows = rest % across * BLOCK_C + tl.arange(0, BLOCK_C)
    is_row = rows < channels
    lanes = tl.arange(0, BLOCK_L)
    weight_sums = tl.zeros([BLOCK_C, BLOCK_L], tl.float32)
    bias_sums = tl.zeros([BLOCK_C, BLOCK_L], tl.float32)
    for block in range(part * steps, tl.minimum(part * steps + steps, blocks)):
        columns = block % along * BLOCK_L + lanes
        sample = group * (blocks // along) + block // along
        place = (sample * channels + rows)[:, None] * length + columns[None, :]
        mask = is_row[:, None] & (columns < length)[None, :]
        weight_sums, bias_sums = _add(weight_sums, bias_sums, normalized, grads, place, mask)
    target = (part.to(tl.int64) * groups + group) * channels + rows
    _store_sums(weight_parts, weight_sums, target, is_row, 1)
    _store_sums(bias_parts, bias_sums, target, is_row, 1)


@triton.jit(do_not_specialize=["parts"])
def _parts_kernel(
    total,  # (count,) float32
    partial,  # (parts, count) float32
    parts,
    count,
    BLOCK_SIZE: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    sums = tl.zeros([BLOCK_SIZE], tl.float32)
    for part in range(parts):
        sums += tl.load(partial + core.to_tensor(part).to(tl.int64) * count + places, mask=places < count, other=0.0)
    tl.store(total + places, sums, mask=places < count)


def _split(programs: int, steps: int) -> tuple[int, int]:
    """Parts that the steps of a loop are split into, and the steps of each."""
    parts = max(1, min(-(-_BUSY // programs), steps // _STEPS))
    each = -(-steps // parts)
    return -(-steps // each), each


def affine_grads_(
    weight_grads: Tensor | None,  # (M, C) float32
    bias_grads: Tensor | None,  # (M, C) float32
    normalized: Tensor | None,  # (M, S, C, L)
    grad_outputs: Tensor,  # (M, S, C, L)
) -> None:
    """See :func:`sam_kernels.functional.per_sample.affine_grads_`."""
    m, positions, channels, length = grad_outputs.shape
    wanted = [tensor for tensor in (weight_grads, bias_grads) if tensor is not None]
    if not wanted:
        return
    in_columns = length == 1
    block_c = min(_COLUMNS if in_columns else 1 << 30, triton.next_power_of_2(channels))
    block_l = min(_LONG_ROW, triton.next_power_of_2(length))
    block_c = block_c if in_columns else min(block_c, _TILE // block_l)
    programs = m * -(-channels // block_c)
    block_s = _TILE // block_c
    units = -(-positions // block_s) if in_columns else positions * -(-length // block_l)
    parts, steps = _split(programs, units)
    found = wanted if parts == 1 else [tensor.new_empty((parts, m, channels)) for tensor in wanted]
    given = dict(zip([tensor is weight_grads for tensor in wanted], found, strict=True))
    operands = given.get(True), given.get(False), normalized, grad_outputs, m
    kernel, sizes = (_columns_kernel, [positions, channels]) if in_columns else (_rows_kernel, [channels, length, units])
    blocks = {"BLOCK_S": block_s} if in_columns else {"BLOCK_L": block_l}
    launch(kernel, programs * parts, grad_outputs.device, *operands, *sizes, steps, parts, BLOCK_C=block_c, **blocks)
    for total, partial in zip(wanted, found, strict=True) if parts > 1 else ():
        count = total.numel()
        launch(_parts_kernel, -(-count // _BLOCK), total.device, total, partial, parts, count, BLOCK_SIZE=_BLOCK)
