"""How tensors are cut whose slices along the first dimension must not be: each slice belongs to one program."""

from __future__ import annotations

__all__ = ["ALIGNED_ELEMENTS", "columns_of", "whole_slices"]

ALIGNED_ELEMENTS = 8  # a slice of a multiple of these begins at a multiple of 16 bytes where its tensor does: 16 bytes of a 16-bit type
# Slices side by side in a block: each width is four times the one before, so that at least a quarter of a block is used, and few kernels
# are compiled. At the least two, so that half a block holds one (see _blocks.py).
_SIDE_BY_SIDE = (128, 32, 8, 2)


def columns_of(slice_size: int, block: int) -> int | None:
    """Columns of a block that holds slices of this size, a slice a line: 0 without slices, None for slices that are too long."""
    if slice_size == 0:
        return 0
    return next((block // lines for lines in _SIDE_BY_SIDE if slice_size * lines <= block), None)


def whole_slices(slice_size: int, block: int, chunk_size: int) -> int:
    """Elements of a chunk: as many slices as fit, or one that no block holds."""
    columns = columns_of(slice_size, block)
    return slice_size if columns is None else chunk_size if columns == 0 else chunk_size // slice_size * slice_size
