"""Lists of tensors that a backend may describe once and reuse."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["TensorList"]


class TensorList(list[Tensor]):
    """A list whose owner vouches for it, so that operations neither check nor regroup it.

    The owner promises: every tensor is strided and floating point, all are on one device, and lists given together to one operation have equal
    lengths, equal shapes row by row, and equal dense memory order row by row. The list is not changed after it was made.

    ``native`` is the native backend's description (pointers, sizes, dtypes), made on first use. It is valid while the tensors stay where they
    are, which the owner watches too.
    """

    __slots__ = ("native",)

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__(tensors)
        self.native: Any = None
