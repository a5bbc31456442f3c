"""Scalars as the kernels take them: those on a device stay there, where kernels read float32 and float64 and write flags in float32."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch
from torch import Tensor

from sam_kernels.operations import Operation

__all__ = ["readable", "value_of", "write_back"]

_Op = TypeVar("_Op", bound=Operation)


def readable(op: _Op) -> _Op:
    """``op`` with scalars that the CUDA kernels can read, and flags that they can write. The caller keeps the result until after the
    launch: memory of a tensor that was converted is used again otherwise."""
    converted: dict[str, Tensor] = {}
    for name in (*op.numbers, *op.scalars):
        value = getattr(op, name)
        if isinstance(value, Tensor) and value.dtype is not torch.float32 and (value.dtype is not torch.float64 or name in op.reports):
            converted[name] = value.to(torch.float32)
    return dataclasses.replace(op, **converted) if converted else op


def write_back(op: Operation, used: Operation) -> None:
    """What the kernels have written to flags that :func:`readable` had to convert."""
    if used is op:
        return
    for name in op.reports:
        if getattr(used, name) is not getattr(op, name):
            getattr(op, name).copy_(getattr(used, name))


def value_of(number: float | Tensor) -> float:
    """A number as the CPU kernels take it."""
    return number.item() if isinstance(number, Tensor) else number
