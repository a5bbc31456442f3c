"""How the products are cut: the tile of a program, how deep a step of its loop goes, warps, and buffers of its pipeline.

A fixed table and no tuning at run time: ``square_norms`` are added to, so that an operation cannot be run twice; and a table has the same
bits everywhere. Nothing here has been measured: reasons are those of an H100's data sheet (132 multiprocessors, 228 KB of shared memory
each, 3.35 TB/s, 990 TFLOP/s bfloat16, 495 tf32, 67 float32). ``python -m bench.gpu --sweep`` tries others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import triton

__all__ = ["ENOUGH", "KINDS", "LEAST", "TILES", "TILE_ELEMENTS", "Tile", "direct_tile", "gram_tile", "kind_of", "tuned"]

LEAST = 16  # what tl.dot takes at least, of every size; what is smaller is padded with zeros
ENOUGH = 264  # programs: two for each multiprocessor, so that one waits for memory while the other multiplies
TILE_ELEMENTS = 2048  # of its one operand that a program without products reads at a time: 16 a thread, as norms do; of two, half


@dataclass(frozen=True)
class Tile:
    """``rows`` by ``columns`` sums in registers; ``depth`` terms of each (but no more than 128 bytes of an operand) are read at a time,
    into one of ``num_stages`` buffers."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


_ROW_BYTES = 128  # of an operand's row in a step

# What a product is made of: 16-bit operands as they are, float32 cut to tf32 by the tensor cores, or float32 multiplied as such.
KINDS = ("bf16", "fp16", "tf32", "ieee")

# The largest tile first: each element that is read takes part in as many products as the tile is wide. 128 by 128 in 8 warps are 64
# registers a thread for each sum, and the Gram form has two of them; larger ones would spill. wgmma wants 64 rows or more for four warps.
# A step is a row of 128 bytes, the widest that shared memory is swizzled for: 64 elements of 16 bits, 32 of 32 bits. Three buffers of two
# 128-row operands are 96 KB: what a block may have on sm_86 and sm_120 (99 KB). Two blocks fit an H100's multiprocessor by that; by
# registers two of the direct form do, and one of the Gram form.
_TENSOR_CORES = (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4))
# float32 outside of the tensor cores: each thread holds its rows and columns of a step in registers, so that steps are short. Two sums of
# 128 by 128 would spill.
_REGISTERS = (Tile(128, 128, 16, 8, 3), Tile(64, 64, 16, 4, 3))
_DIRECT: dict[str, tuple[Tile, ...]] = {kind: _REGISTERS if kind == "ieee" else _TENSOR_CORES for kind in KINDS}
TILES: dict[str, dict[str, tuple[Tile, ...]]] = {"direct": _DIRECT, "gram": _DIRECT | {"ieee": _REGISTERS[1:]}}


@contextmanager
def tuned(method: str, kind: str, *tiles: Tile) -> Iterator[None]:
    """While open, these are the tiles of a form ("direct", "gram") for a kind of product."""
    before = TILES[method][kind]
    TILES[method][kind] = tiles
    try:
        yield
    finally:
        TILES[method][kind] = before


def kind_of(precision: str, *dtypes: torch.dtype) -> str:
    """Of a product of operands of these dtypes. bfloat16 and float16 have no 16 bits in common, but both are exact in tf32."""
    kinds = {{torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, precision) for dtype in dtypes}
    kind = kinds.pop() if len(kinds) == 1 else "ieee" if "ieee" in kinds else "tf32"
    return "ieee" if kind == "tf32" and torch.version.hip else kind  # most of AMD's devices have no tf32


def _fit(size: int, most: int) -> int:
    return max(LEAST, min(most, int(triton.next_power_of_2(size))))


def _chosen(tiles: tuple[Tile, ...], rows: int, columns: int, programs: Callable[[Tile], int]) -> Tile:
    """The largest tile that is no larger than what there is and leaves enough programs, else the smallest, cut to what there is."""
    fitting = (tile for tile in tiles if tile.rows <= _fit(rows, tile.rows) and tile.columns <= _fit(columns, tile.columns))
    tile = next((tile for tile in fitting if programs(tile) >= ENOUGH), tiles[-1])
    return replace(tile, rows=_fit(rows, tile.rows), columns=_fit(columns, tile.columns))


def gram_tile(kind: str, groups: int, tokens: int, features: int, itemsize: int) -> Tile:
    """Of T positions by T, for an operand whose elements have ``itemsize`` bytes."""

    def programs(tile: Tile) -> int:
        sides = -(-tokens // tile.rows)
        return groups * sides * (sides + 1) // 2

    tile = _chosen(TILES["gram"][kind], tokens, tokens, programs)
    # A few positions: there is one program a group then, which is to have as many bytes under way as one of 64 has.
    return replace(tile, depth=_fit(features, min(tile.depth, _ROW_BYTES // itemsize) * max(1, 64 // tile.rows)))


def direct_tile(kind: str, groups: int, tokens: int, in_features: int, out_features: int, itemsize: int) -> Tile:
    """Of p rows and d columns; ``itemsize`` of the wider operand."""

    def programs(tile: Tile) -> int:
        return groups * -(-out_features // tile.rows) * -(-in_features // tile.columns)

    tile = _chosen(TILES["direct"][kind], out_features, in_features, programs)
    return replace(tile, depth=_fit(tokens, min(tile.depth, _ROW_BYTES // itemsize)))
