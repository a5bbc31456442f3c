"""|gradient|^2 of an embedding: the squares of the sums of the rows that share an index.

Specification: ``sam_kernels.reference.per_sample.embedding_square_norms_``. Positions are sorted by index within their group (stably, so
that sums have one order), which leaves the rows of each index in a run. A program for each sorted position and block of columns: where a
run begins there, it walks the run and adds up its rows, in float32, else it has nothing to do. Reads g once, and nothing else that grows
with D: M T D s bytes, 12 M T for indices and their order.

The other way, masked tiles of GG', would do T^2 D flops, nearly all for zeros, where these are T D additions beside one read; and an index
that fills half of a batch (padding that nobody named) would not spare it a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sam_kernels.backends.triton._blocks import load_where
from sam_kernels.backends.triton.per_sample._finish import finish
from sam_kernels.backends.triton.per_sample._launch import launch

__all__ = ["embedding_square_norms_"]

_COLUMNS = 1024  # of a program: 8 a thread. Most runs are one row: programs are many and short
_ROWS = 4  # of a run that are under way at a time, or a long one would wait for each of its rows


@triton.jit(do_not_specialize=["tokens", "padding_idx"])
def _runs_kernel(
    partials,  # (M, T, blocks of columns) float32
    ids,  # (M, T) int64, sorted
    order,  # (M, T) int64: where they were
    grads,  # (M, T, D)
    tokens,
    dim,
    padding_idx,  # None: there is none
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(dim, BLOCK_D)
    place, columns = program // blocks, program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    group = (place // tokens).to(tl.int64)
    start = place % tokens
    mine = ids + group * tokens
    index = tl.load(mine + start)
    begins = (start == 0) | (tl.load(mine + start - 1, mask=start > 0, other=0) != index)
    if padding_idx is not None:
        begins = begins & (index != padding_idx)
    total = 0.0
    if begins:
        is_column = columns < dim
        first = grads + (group * tokens + tl.load(order + group * tokens + start)) * dim
        sums = load_where(first, columns, is_column)
        lanes = tl.arange(0, ROWS)
        position = start + 1
        more = tl.load(mine + position, mask=position < tokens, other=0) == index
        more = more & (position < tokens)
        while more:
            rows = position + lanes
            same = (rows < tokens) & (tl.load(mine + rows, mask=rows < tokens, other=0) == index)
            sources = group * tokens + tl.load(order + group * tokens + rows, mask=same, other=0)
            values = load_where(grads, sources[:, None] * dim + columns[None, :], same[:, None] & is_column[None, :])
            sums += tl.sum(values, axis=0)
            position += ROWS
            more = tl.sum(same.to(tl.int32)) == ROWS
        total = tl.sum(sums * sums)
    tl.store(partials + program, total)


def embedding_square_norms_(
    square_norms: Tensor,  # (M,) float64
    indices: Tensor,  # (M, T) int64
    grad_outputs: Tensor,  # (M, T, D)
    *,
    padding_idx: int | None,
) -> None:
    """See :func:`sam_kernels.functional.per_sample.embedding_square_norms_`."""
    m, tokens, dim = grad_outputs.shape
    ids, order = torch.sort(indices, dim=1, stable=True)
    block = min(_COLUMNS, triton.next_power_of_2(dim))
    blocks = -(-dim // block)
    partials = torch.empty((m, tokens * blocks), dtype=torch.float32, device=grad_outputs.device)
    launch(
        _runs_kernel,
        m * tokens * blocks,
        grad_outputs.device,
        partials,
        ids,
        order,
        grad_outputs,
        tokens,
        dim,
        padding_idx,
        ROWS=_ROWS,
        BLOCK_D=block,
    )
    finish(square_norms, partials)
