"""|G'A|^2 by Gram matrices: the sum over positions s, t of (AA')_st (GG')_st.

Specification: ``sam_kernels.reference.per_sample.linear_square_norms_``. A program takes one tile s <= t of one group: its part of AA',
then of GG', both in float32 registers, their product added up, twice where s < t. One number a program leaves it, whatever T is:
T^2 (d + p) flops a group (and a tile's width T (d + p) more for the diagonal), M T (d + p) s bytes from memory where a group fits the
second-level cache. Any dtypes: the two matrices never meet before they are float32.

With a bias its gradient's |sum over t of g_t|^2 too, from (AA')_st + 1: rows past the last position have a 1 as well, but none of GG'.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sam_kernels.backends.triton.per_sample._config import gram_tile, kind_of
from sam_kernels.backends.triton.per_sample._dots import dot
from sam_kernels.backends.triton.per_sample._finish import finish
from sam_kernels.backends.triton.per_sample._launch import launch

__all__ = ["gram_square_norms_"]


@triton.jit
def _tile_of(pair):  # row, column <= row
    """The lower triangle's tiles, row by row. The root is float32: it is off by one at most, for fewer than 2^22 rows."""
    row = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row.to(tl.int64) * (row + 1) // 2 > pair, row - 1, row)
    row = tl.where((row + 1).to(tl.int64) * (row + 2) // 2 <= pair, row + 1, row)
    return row, (pair - row.to(tl.int64) * (row + 1) // 2).to(tl.int32)


@triton.jit
def _gram_tile(
    operand,  # (T, features) of the group
    row, column,  # first position of each side
    tokens, features,
    KIND: tl.constexpr, BLOCK_T: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    lanes, depth = tl.arange(0, BLOCK_T), tl.arange(0, DEPTH)
    rows = operand + (row + lanes).to(tl.int64)[:, None] * features + depth[None, :]
    columns = operand + (column + lanes).to(tl.int64)[None, :] * features + depth[:, None]
    is_row, is_column = (row + lanes < tokens)[:, None], (column + lanes < tokens)[None, :]
    sums = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for k in range(0, features, DEPTH):
        within = k + depth < features
        x = tl.load(rows + k, mask=is_row & within[None, :], other=0.0)
        y = tl.load(columns + k, mask=is_column & within[:, None], other=0.0)
        sums = dot(x, y, sums, KIND)
    return sums


@triton.jit(do_not_specialize=["tokens", "pairs"])
def _gram_kernel(
    partials,  # (M, pairs) float32
    inputs,  # (M, T, d)
    grads,  # (M, T, p)
    tokens,
    in_features,
    out_features,
    pairs,
    bias,  # float32, 0 or 1: as an integer it would be compiled twice
    INPUTS_KIND: tl.constexpr,
    GRADS_KIND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    INPUTS_DEPTH: tl.constexpr,
    GRADS_DEPTH: tl.constexpr,
):
    program = tl.program_id(0)
    row, column = _tile_of(program % pairs)
    first = (program // pairs).to(tl.int64) * tokens
    a = _gram_tile(inputs + first * in_features, row * BLOCK_T, column * BLOCK_T, tokens, in_features, INPUTS_KIND, BLOCK_T, INPUTS_DEPTH)
    g = _gram_tile(grads + first * out_features, row * BLOCK_T, column * BLOCK_T, tokens, out_features, GRADS_KIND, BLOCK_T, GRADS_DEPTH)
    total = tl.sum((a + bias) * g)
    tl.store(partials + program, tl.where(row == column, total, 2.0 * total))


def gram_square_norms_(square_norms: Tensor, inputs: Tensor, grads: Tensor, *, bias: bool, precision: str) -> None:
    """Adds |G'A|^2 of each group, with ``bias`` as of inputs with a 1 behind the last feature."""
    m, tokens, in_features = inputs.shape
    out_features = grads.shape[2]
    kinds = kind_of(precision, inputs.dtype), kind_of(precision, grads.dtype)
    ours = [gram_tile(kind, m, tokens, x.shape[2], x.element_size()) for kind, x in zip(kinds, (inputs, grads), strict=True)]
    tile = min(ours, key=lambda tile: tile.rows)  # one for both: of two precisions the smaller
    sides = -(-tokens // tile.rows)
    pairs = sides * (sides + 1) // 2
    partials = torch.empty((m, pairs), dtype=torch.float32, device=inputs.device)
    launch(
        _gram_kernel,
        m * pairs,
        inputs.device,
        partials,
        inputs,
        grads,
        tokens,
        in_features,
        out_features,
        pairs,
        float(bias),
        tile=tile,
        INPUTS_KIND=kinds[0],
        GRADS_KIND=kinds[1],
        BLOCK_T=tile.rows,
        INPUTS_DEPTH=ours[0].depth,
        GRADS_DEPTH=ours[1].depth,
    )
    finish(square_norms, partials)
