"""Numbers and flags as the kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["address", "flag_of", "number_of", "readable", "value_of", "write_back"]

_Number = float | Tensor | None
_READABLE = (torch.float32, torch.float64)


def readable(*numbers: _Number) -> tuple[_Number, ...]:
    """The numbers as the CUDA kernels read them: a tensor that is neither float32 nor float64 in float32, which holds every value of the
    narrower types. The caller keeps the result in a variable until after the launch; its memory is used again otherwise.
    """
    return tuple([n.to(torch.float32) if isinstance(n, Tensor) and n.dtype not in _READABLE else n for n in numbers])


def number_of(number: _Number) -> float | tuple[int, bool] | None:
    """A number as the CUDA kernels take it: by value, or the address of one on the device and whether it is float64.

    Of a tensor that :func:`readable` has made, or that is float32 or float64 by contract.
    """
    if not isinstance(number, Tensor):
        return number
    assert number.dtype in _READABLE, f"a {number.dtype} number has no kernel"
    return address(number), number.dtype is torch.float64


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
    """Where a tensor of one element lies; 0 for None. Raises TypeError for a tensor without memory."""
    if tensor is None:
        return 0
    pointer = tensor.data_ptr()
    if pointer == 0:
        raise TypeError(f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} has no memory")
    return pointer
