"""Lists of tensors that a backend may describe once and reuse, and what makes a row of them fit for a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["TensorList", "are_trusted", "arithmetic_dtype", "is_dense_row", "slice_sizes", "slices_are_runs"]


class TensorList(list[Tensor]):
    """A list that its owner has validated: operations neither check nor regroup it.

    The owner promises: every tensor is strided and floating point, all are on one device, and lists given together to one operation have
    equal lengths, equal shapes row by row, and equal dense memory order row by row. The list is not changed after it was made.

    ``descriptions`` holds what backends know of the list (pointers, sizes, dtypes), each under its own name, made on first use. They are
    valid while the tensors stay where they are, which the owner watches too.
    """

    __slots__ = ("descriptions",)

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__(tensors)
        self.descriptions: dict[str, Any] = {}


_TRUSTED = frozenset({TensorList, type(None)})


def are_trusted(lists: Iterable[Sequence[Any] | None]) -> bool:
    """Whether every list that is given is a :class:`TensorList`."""
    return _TRUSTED.issuperset(map(type, lists))


def arithmetic_dtype(tensors: Iterable[Tensor | None]) -> torch.dtype:
    """The dtype in which operations calculate with these tensors: float64 if one of them is float64, otherwise float32."""
    return torch.float64 if any(tensor is not None and tensor.dtype is torch.float64 for tensor in tensors) else torch.float32


def is_dense_row(tensors: Sequence[Tensor]) -> bool:
    """All tensors of a row have the same strides and fill their memory without holes or overlaps, so elements pair up in memory order."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    strides = tensors[0].stride()
    return all(tensor.stride() == strides for tensor in tensors) and _fills_memory(tensors[0])


def slice_sizes(tensors: Sequence[Tensor]) -> list[int]:
    """Elements of each tensor that share an index of its first dimension; 0 for one of fewer than two dimensions, or an empty one."""
    return [tensor.numel() // tensor.size(0) if tensor.dim() > 1 and tensor.numel() > 0 else 0 for tensor in tensors]


def slices_are_runs(tensor: Tensor) -> bool:
    """Of a dense tensor: what shares an index of the first dimension lies together, whatever its own order (channels last, say)."""
    return tensor.is_contiguous() or tensor.dim() < 2 or tensor.size(0) == 1 or tensor.stride(0) * tensor.size(0) == tensor.numel()


def _fills_memory(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
