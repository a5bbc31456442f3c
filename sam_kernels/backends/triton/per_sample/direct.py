"""|G'A|^2 from the gradient's own tiles, each squared where it is made.

Specification: ``sam_kernels.reference.per_sample.linear_square_norms_``. A program takes one (BLOCK_P, BLOCK_D) tile of one group's (p, d)
gradient over all T positions, in float32 registers; its squares leave it as one number, and the tile itself only where ``products`` are
wanted. 2 T d p flops a group; M T (d + p) s bytes from memory where a group fits the second-level cache, and M p d written with products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import core

from sam_kernels.backends.triton.per_sample._config import direct_tile, kind_of
from sam_kernels.backends.triton.per_sample._dots import dot
from sam_kernels.backends.triton.per_sample._finish import finish
from sam_kernels.backends.triton.per_sample._launch import launch

__all__ = ["direct_square_norms_"]


@triton.jit(do_not_specialize=["tokens"])
def _direct_kernel(
    partials,  # (M, tiles) float32
    products,  # (M, p, d) float32 or None
    inputs,  # (M, T, d)
    grads,  # (M, T, p)
    tokens,
    in_features,
    out_features,
    KIND: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPTH: tl.constexpr,
):
    program = tl.program_id(0)
    across, down = tl.cdiv(in_features, BLOCK_D), tl.cdiv(out_features, BLOCK_P)
    group = (program // (across * down)).to(tl.int64)
    tile = program % (across * down)
    # Down a column first: programs that run together share the inputs' columns, and the wider side is read once more for each of them.
    rows = tile % down * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tile // down * BLOCK_D + tl.arange(0, BLOCK_D)
    is_row, is_column = rows < out_features, columns < in_features
    depth = tl.arange(0, DEPTH)
    mine, theirs = grads + group * tokens * out_features, inputs + group * tokens * in_features
    g_offsets = depth.to(tl.int64)[None, :] * out_features + rows[:, None]
    a_offsets = depth.to(tl.int64)[:, None] * in_features + columns[None, :]
    sums = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for t in range(0, tokens, DEPTH):
        within, far = t + depth < tokens, core.to_tensor(t).to(tl.int64)
        g = tl.load(mine + far * out_features + g_offsets, mask=is_row[:, None] & within[None, :], other=0.0)
        a = tl.load(theirs + far * in_features + a_offsets, mask=within[:, None] & is_column[None, :], other=0.0)
        sums = dot(g, a, sums, KIND)
    if products is not None:
        place = (group * out_features + rows)[:, None] * in_features + columns[None, :]
        tl.store(products + place, sums, mask=is_row[:, None] & is_column[None, :])
    tl.store(partials + program, tl.sum(sums * sums))


def direct_square_norms_(square_norms: Tensor, inputs: Tensor, grads: Tensor, products: Tensor | None, precision: str) -> None:
    """Adds |G'A|^2 of each group, and writes the gradients where ``products`` are given."""
    m, tokens, in_features = inputs.shape
    out_features = grads.shape[2]
    kind = kind_of(precision, inputs.dtype, grads.dtype)
    tile = direct_tile(kind, m, tokens, in_features, out_features, max(inputs.element_size(), grads.element_size()))
    tiles = -(-out_features // tile.rows) * -(-in_features // tile.columns)
    partials = torch.empty((m, tiles), dtype=torch.float32, device=inputs.device)
    launch(
        _direct_kernel,
        m * tiles,
        inputs.device,
        partials,
        products,
        inputs,
        grads,
        tokens,
        in_features,
        out_features,
        tile=tile,
        KIND=kind,
        BLOCK_P=tile.rows,
        BLOCK_D=tile.columns,
        DEPTH=tile.depth,
    )
    finish(square_norms, partials)
