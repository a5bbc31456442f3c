"""Checks that the operations per sample share."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sam_kernels import _dispatch
from sam_kernels._validate import check_choice, check_memory, check_tensor, describe

__all__ = ["METHODS", "PRECISIONS", "backend_for", "check_how", "check_on", "check_output", "check_shape"]

METHODS = ("auto", "gram", "direct")
PRECISIONS = ("ieee", "tf32", "bf16")


def check_shape(op: str, name: str, tensor: object, dims: int, expected: str) -> Tensor:
    """``tensor`` is dense, floating point and of so many dimensions. Raises TypeError or ValueError otherwise."""
    checked = check_tensor(op, name, tensor)
    if checked.dim() != dims:
        raise ValueError(f"{op}: {name} must have shape {expected}, got {tuple(checked.shape)}")
    return checked


def check_output(op: str, name: str, tensor: object, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``tensor``, to be written, is contiguous and of this shape and dtype. Raises TypeError or ValueError otherwise."""
    if not isinstance(tensor, Tensor) or tensor.dtype is not dtype:
        raise TypeError(f"{op}: {name} must be a {dtype} tensor, got {describe(tensor)}")
    check_memory(op, name, tensor)
    if tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous and of shape {shape}, got {describe(tensor)}")
    return tensor


def check_on(op: str, device: torch.device, tensors: dict[str, Tensor | None]) -> None:
    """The tensors, which have memory, are on the device of ``grad_outputs``. Raises ValueError otherwise."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, grad_outputs is on {device}")


def check_how(op: str, method: Any, precision: Any, products: Tensor | None) -> None:
    """``method`` and ``precision`` are known, and the method is one that forms the products where they are wanted."""
    check_choice(op, "method", method, METHODS)
    check_choice(op, "precision", precision, PRECISIONS)
    if products is not None and method == "gram":
        raise ValueError(f"{op}: method='gram' never forms the products; use 'direct' or 'auto'")


def backend_for(*tensors: Tensor | None) -> ModuleType:
    given = [tensor for tensor in tensors if tensor is not None]
    return _dispatch.select_per_sample(given[0].device.type, [tensor.dtype for tensor in given])
