"""Numbers and flags as the kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["address", "flag_of", "number_of", "value_of", "write_back"]


def number_of(number: float | Tensor | None) -> float | tuple[int, bool] | None:
    """A number as the CUDA kernels take it: by value, or the address of one on the device and whether it is float64."""
    if not isinstance(number, Tensor):
        return number
    if number.dtype not in (torch.float32, torch.float64):
        number = number.to(torch.float32)  # freed before it is read, in this stream's order: nobody writes it before
    return number.data_ptr(), number.dtype is torch.float64


def value_of(number: float | Tensor) -> float:
    """A number as the CPU kernels take it."""
    return number.item() if isinstance(number, Tensor) else number


def flag_of(flag: Tensor | None) -> Tensor | None:
    """A flag that kernels may write: in float32."""
    return flag if flag is None or flag.dtype is torch.float32 else flag.to(torch.float32)


def write_back(flag: Tensor | None, used: Tensor | None) -> None:
    if flag is not None and used is not None and flag is not used:
        flag.copy_(used)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
