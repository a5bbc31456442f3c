"""Lists of tensors as the launchers know them: addresses, sizes and types, read once and kept with the list."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sam_kernels._memory_of import ORDINARY_TYPES
from sam_kernels._tensor_list import TensorList, is_dense_row
from sam_kernels.backends.triton._requirements import DEVICE_TYPES

__all__ = ["DTYPES", "Contents", "Description", "current_grads", "describe_list", "is_current", "vouch"]

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


@dataclass(eq=False)
class Contents:
    """Where the tensors of a list lie, how large they are and of what type."""

    pointers: list[int]
    numels: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


@dataclass(eq=False)
class Description:
    """What a launch needs to know about a list.

    ``owner`` is the description that outlives this one (a gradient list is made anew every step, the parameters' list is not): tables are
    kept there.
    """

    device: torch.device
    contents: Contents  # apart: a table that knew its owner would be freed only by the collector of cycles
    non_contiguous: list[int]  # indices
    owner: Description | None = None
    tables: dict[Any, Any] = field(default_factory=dict)


def describe_list(tensors: Sequence[Tensor]) -> Description:
    """The description of a list, kept with it where it can be. Raises TypeError or ValueError for tensors without kernels."""
    known = tensors.descriptions.get("triton") if isinstance(tensors, TensorList) else None
    if isinstance(known, Description):
        return known
    dtypes = tuple([tensor.dtype for tensor in tensors])
    if not DTYPES.issuperset(dtypes):
        unknown = next(dtype for dtype in dtypes if dtype not in DTYPES)
        raise TypeError(f"backend 'triton' has no kernels for {unknown}, only for float32, bfloat16 and float16")
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or next(iter(devices)).type not in DEVICE_TYPES:
        raise ValueError(f"backend 'triton' takes tensors of one device of type {sorted(DEVICE_TYPES)}, got {sorted(map(str, devices))}")
    pointers, numels = [tensor.data_ptr() for tensor in tensors], tuple([tensor.numel() for tensor in tensors])
    if 0 in pointers and (i := next((i for i, numel in enumerate(numels) if numel > 0 and pointers[i] == 0), None)) is not None:
        raise TypeError(f"tensor {i} of the list, a {type(tensors[i]).__name__}, has no memory")
    described = Description(
        devices.pop(),
        Contents(pointers, numels, dtypes),
        [i for i, tensor in enumerate(tensors) if not tensor.is_contiguous()],
    )
    if isinstance(tensors, TensorList):
        tensors.descriptions["triton"] = described
    return described


def vouch(tensors: Sequence[Tensor], like: TensorList | None = None) -> TensorList | None:
    """A :class:`TensorList` of these tensors if every row is dense and in the memory order of ``like``'s (default: its own), else None."""
    if len(tensors) == 0 or not all(tensor.layout is torch.strided for tensor in tensors):
        return None
    result = TensorList(tensors)
    try:
        described, other = describe_list(result), None if like is None else describe_list(like)
    except (TypeError, ValueError):  # the caller's checks have the words for it
        return None
    odd = described.non_contiguous
    if like is None or other is None or all(tensor.dim() == 0 for tensor in tensors):  # the latter: step counters, beside any parameters
        dense = all(is_dense_row([tensors[i]]) for i in odd)
    else:
        dense = odd == other.non_contiguous and all(tensors[i].stride() == like[i].stride() for i in odd)
    if not dense:
        return None
    if other is not None:
        described.owner = other.owner or other
    return result


def current_grads(known: TensorList, params: list[Tensor]) -> TensorList | None:
    """The gradients of ``params``, vouched for; None unless they are the tensors of ``known``, unmoved, each with an ordinary gradient."""
    if not is_current(known, params):
        return None
    grads = [param.grad for param in params]
    if not all(map(operator.is_not, grads, [None] * len(grads))):
        return None
    return _vouch_usual(grads, describe_list(known)) or vouch(grads, known)  # type: ignore[arg-type]  # none of them is None


def _vouch_usual(grads: list[Tensor], owner: Description) -> TensorList | None:
    """:func:`vouch` of gradients where nothing is unusual, in a third of its time; None elsewhere. A gradient has the device and
    the shape of its parameter: torch sees to that."""
    if owner.non_contiguous or not ORDINARY_TYPES.issuperset(map(type, grads)):
        return None
    try:
        pointers, is_dense = list(map(Tensor.data_ptr, grads)), all(map(Tensor.is_contiguous, grads))
    except RuntimeError:  # sparse, or of a transform
        return None
    dtypes = tuple([grad.dtype for grad in grads])
    if not is_dense or 0 in pointers or not DTYPES.issuperset(dtypes):
        return None
    result = TensorList(grads)
    result.descriptions["triton"] = Description(owner.device, Contents(pointers, owner.contents.numels, dtypes), [], owner.owner or owner)
    return result


def is_current(known: TensorList, tensors: list[Tensor]) -> bool:
    """Whether ``tensors`` are those of ``known``, still where they lay when it was made."""
    if len(known) != len(tensors) or not all(map(operator.is_, known, tensors)):
        return False
    return describe_list(known).contents.pointers == [tensor.data_ptr() for tensor in tensors]
