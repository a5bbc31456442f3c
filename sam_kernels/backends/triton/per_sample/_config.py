"""How the products are cut: the tile of a program, how deep a step of its loop goes, warps, and buffers of its pipeline.

A fixed table and no tuning at run time: ``square_norms`` are added to, so that an operation cannot be run twice; and a table has the same
bits everywhere. Nothing here has been measured: reasons are those of an H100's data sheet (132 multiprocessors, 228 KB of shared memory
each, 3.35 TB/s, 990 TFLOP/s bfloat16, 495 tf32, 67 float32). ``python -m bench.gpu --sweep`` tries others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

__all__ = ["DIRECT", "ENOUGH", "GRAM", "KINDS", "LEAST", "TILE_ELEMENTS", "Tile", "direct_tile", "gram_tile", "kind_of"]

LEAST = 16  # what tl.dot takes at least, of every size; what is smaller is padded with zeros
ENOUGH = 264  # programs: two for each multiprocessor, so that one waits for memory while the other multiplies
TILE_ELEMENTS = 2048  # of an operand that a program without products reads at a time: 16 a thread, as norms do


@dataclass(frozen=True)
class Tile:
    """``rows`` by ``columns`` sums in registers; ``depth`` of the sum are read at a time, into one of ``num_stages`` buffers."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# What a product is made of: 16-bit operands as they are, float32 rounded to tf32 by the tensor cores, or float32 multiplied as such.
KINDS = ("bf16", "fp16", "tf32", "ieee")

# The largest tile first: each element that is read takes part in as many products as the tile is wide. 128 by 128 in 8 warps are 64
# registers a thread for each sum, and the Gram form has two of them; larger ones would spill. wgmma wants 64 rows or more for four warps.
# A row of a step is 128 bytes, the widest that shared memory is swizzled for: 64 elements of 16 bits, 32 of 32 bits. Three buffers of two
# 128-row operands are 96 KB: what a block may have on sm_86 and sm_120 (99 KB), and two blocks fit an H100's multiprocessor.
_TENSOR_CORES = (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4))
# float32 outside of the tensor cores: each thread holds its rows and columns of a whole step in registers, so that steps are short.
_REGISTERS = (Tile(64, 64, 16, 4, 3),)
GRAM: dict[str, tuple[Tile, ...]] = dict.fromkeys(("bf16", "fp16", "tf32"), _TENSOR_CORES) | {"ieee": _REGISTERS}
DIRECT: dict[str, tuple[Tile, ...]] = dict(GRAM)
_WIDE = ("tf32", "ieee")


def kind_of(precision: str, *dtypes: torch.dtype) -> str:
    """Of a product of operands of these dtypes. bfloat16 and float16 have no 16 bits in common, but both are exact in tf32."""
    of_single = "bf16" if precision == "bf16" else precision
    kinds = {{torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, of_single) for dtype in dtypes}
    if len(kinds) == 1:
        return kinds.pop()
    return "ieee" if "ieee" in kinds else "tf32"


def _fit(size: int, most: int) -> int:
    return max(LEAST, min(most, int(triton.next_power_of_2(size))))


def _depth(tile: Tile, kind: str, size: int) -> int:
    """A row of 128 bytes; shorter where there is less to add up."""
    return _fit(size, tile.depth // 2 if kind == "tf32" else tile.depth)


def gram_tile(kind: str, groups: int, tokens: int, features: int) -> Tile:
    """The largest tile that leaves enough programs, else the smallest: of T positions by T."""
    for tile in GRAM[kind]:
        sides = -(-tokens // tile.rows)
        if groups * sides * (sides + 1) // 2 >= ENOUGH:
            break
    rows = _fit(tokens, tile.rows)
    return replace(tile, rows=rows, columns=rows, depth=_depth(tile, kind, features))


def direct_tile(kind: str, groups: int, tokens: int, in_features: int, out_features: int) -> Tile:
    """The same, of p rows and d columns."""
    for tile in DIRECT[kind]:
        if groups * -(-out_features // tile.rows) * -(-in_features // tile.columns) >= ENOUGH:
            break
    rows, columns = _fit(out_features, tile.rows), _fit(in_features, tile.columns)
    return replace(tile, rows=rows, columns=columns, depth=_depth(tile, kind, tokens))
