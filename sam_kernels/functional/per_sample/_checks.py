"""What the operations per sample check alike."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sam_kernels import _dispatch
from sam_kernels._validate import check_choice, check_memory, check_tensor, describe

__all__ = ["METHODS", "PRECISIONS", "arithmetic_of", "backend_for", "check_how", "check_on", "check_output", "check_shape"]

METHODS = ("auto", "gram", "direct")
PRECISIONS = ("ieee", "tf32", "bf16")


def check_shape(op: str, name: str, tensor: object, dims: int, expected: str) -> Tensor:
    """A dense floating-point tensor of so many dimensions, at least one element in the first. Raises TypeError or ValueError."""
    checked = check_tensor(op, name, tensor)
    if checked.dim() != dims:
        raise ValueError(f"{op}: {name} must have shape {expected}, got {tuple(checked.shape)}")
    return checked


def check_output(op: str, name: str, tensor: object, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of this shape and dtype, to be written. Raises TypeError or ValueError."""
    if not isinstance(tensor, Tensor) or tensor.dtype is not dtype:
        raise TypeError(f"{op}: {name} must be a {dtype} tensor, got {describe(tensor)}")
    check_memory(op, name, tensor)
    if tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous and of shape {shape}, got {describe(tensor)}")
    return tensor


def check_on(op: str, device: torch.device, tensors: dict[str, Tensor | None]) -> None:
    """All on one device. Raises TypeError for the meta device, ValueError for another."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            check_memory(op, name, tensor)
            raise ValueError(f"{op}: {name} is on {tensor.device}, grad_outputs is on {device}")


def check_how(op: str, method: Any, precision: Any, products: Tensor | None) -> None:
    """``method`` and ``precision`` are known, and the method is one that forms the products where they are wanted."""
    check_choice(op, "method", method, METHODS)
    check_choice(op, "precision", precision, PRECISIONS)
    if products is not None and method == "gram":
        raise ValueError(f"{op}: method='gram' never forms the products; use 'direct' or 'auto'")


def arithmetic_of(*tensors: Tensor | None) -> torch.dtype:
    """float64 where a tensor is, otherwise float32."""
    double = any(tensor is not None and tensor.dtype is torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def backend_for(*tensors: Tensor | None) -> ModuleType:
    given = [tensor for tensor in tensors if tensor is not None]
    return _dispatch.select_per_sample(given[0].device.type, [tensor.dtype for tensor in given])
