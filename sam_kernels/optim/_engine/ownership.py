"""Whether a gradient's memory belongs to nobody but the parameter that is asked for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sam_kernels._sharding import is_dtensor

__all__ = ["nobody_else_has", "take_over"]


def _references(tensors: Sequence[Any]) -> list[tuple[int, int, int]]:
    """Of each tensor: references from Python, from C++, and to its memory."""
    count: Any = torch._C  # its counters are not declared
    return [(sys.getrefcount(tensor), tensor._use_count(), count._storage_Use_Count(tensor.untyped_storage()._cdata)) for tensor in tensors]


def _references_of_one() -> tuple[int, int, int] | None:
    """What is counted for a tensor that only a list holds; None where this torch or this Python does not count."""
    try:
        return _references([torch.empty(1, device="cpu")])[0]
    except AttributeError:
        return None


_ALONE = _references_of_one()  # what is counted beside the list depends on the versions of Python and torch


def nobody_else_has(tensors: Sequence[Tensor]) -> list[bool]:
    """For each tensor of a list: whether this list holds the only reference to it and to its memory.

    A gradient that autograd has made passes once ``param.grad`` is None. One that the caller keeps does not, nor a view of a flat buffer
    (DistributedDataParallel's buckets), nor the fixed memory that a graphed backward pass writes every time: all those may be written
    again while they are still needed. A doubt counts as no.
    """
    if _ALONE is None:
        return [False] * len(tensors)
    return [found == _ALONE for found in _references(tensors)]


def take_over(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[bool]:
    """Which of the gradients nobody else has. Those are no longer their parameter's ``grad``, where the next pass would write them.

    ``grads`` of DTensors are local parts. FSDP2 makes them in one buffer for many parameters, so all of them stay.
    """
    if is_dtensor(params[0]):
        return [False] * len(grads)
    for param in params:
        param.grad = None
    ours = nobody_else_has(grads)
    for param, grad, is_ours in zip(params, grads, ours, strict=True):
        if not is_ours:
            param.grad = grad
    return ours
