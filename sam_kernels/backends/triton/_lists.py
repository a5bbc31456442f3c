"""Lists of tensors as the launchers know them: read once and kept with the list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sam_kernels._memory_of import without_memory
from sam_kernels._sharding import READS_PLAINLY
from sam_kernels._tensor_list import TensorList, is_dense_row
from sam_kernels.backends.triton._contents import Contents, contents_of

__all__ = ["Description", "are_locals_of", "current_grads", "current_local_grads", "describe_list", "is_current", "trust"]


@dataclass(eq=False)
class Description:
    """What a launch needs to know about a list.

    ``owner`` is the description that outlives this one (a gradient list is made anew every step, the parameters' list is not): tables are
    kept there.
    """

    device: torch.device
    contents: Contents  # apart: a table that knew its owner would be freed only by the collector of cycles
    owner: Description | None = None
    tables: dict[Any, Any] = field(default_factory=dict)


def describe_list(tensors: Sequence[Tensor]) -> Description:
    """The description of a list, kept with it where it can be. Raises TypeError for tensors without kernels."""
    known = tensors.descriptions.get("triton") if isinstance(tensors, TensorList) else None
    if isinstance(known, Description):
        return known
    return _described(tensors, tensors[0].device, contents_of(tensors))


def _described(tensors: Sequence[Tensor], device: torch.device, contents: Contents, owner: Description | None = None) -> Description:
    if contents.has_float64:
        raise TypeError("backend 'triton' has no kernels for torch.float64, only for float32, bfloat16 and float16")
    described = Description(device, contents, owner)
    if isinstance(tensors, TensorList):
        tensors.descriptions["triton"] = described
    return described


def trust(tensors: Sequence[Tensor], like: TensorList | None = None) -> TensorList | None:
    """A :class:`TensorList` of these tensors if every row is dense and in the memory order of ``like``'s (default: its own), else None.

    None as well for tensors on another device than ``like``'s, step counters on the host for example: the dispatcher has checked the device
    of the parameters alone.
    """
    if len(tensors) == 0 or without_memory(tensors):
        return None
    result = TensorList(tensors)
    try:
        described, other = describe_list(result), None if like is None else describe_list(like)
    except (TypeError, RuntimeError):  # the caller's checks have the words for it
        return None
    if (other is not None and described.device != other.device) or not _is_dense(result, described.contents, like):
        return None
    if other is not None:
        described.owner = other.owner or other
    return result


def _is_dense(tensors: TensorList, contents: Contents, like: TensorList | None) -> bool:
    odd = contents.non_contiguous
    if like is None:
        return all(is_dense_row([tensors[i]]) for i in odd)
    if odd == describe_list(like).contents.non_contiguous:
        return all(tensors[i].stride() == like[i].stride() for i in odd)
    return all(tensor.dim() == 0 for tensor in tensors)  # step counters, beside any parameters


def current_grads(known: TensorList, params: list[Tensor]) -> TensorList | None:
    """The gradients of ``params``, trusted; None unless they are the tensors of ``known``, unmoved, each with an ordinary gradient."""
    try:
        found = describe_list(known).contents.current_grads(params)
    except (RuntimeError, TypeError):
        return None
    return _trusted_grads(known, found)


def current_local_grads(known: TensorList, owners: list[Tensor]) -> TensorList | None:
    """:func:`current_grads` of DTensors, whose local parts are ``known``."""
    try:
        with READS_PLAINLY():
            found = describe_list(known).contents.current_local_grads(owners)
    except (AttributeError, RuntimeError, TypeError):  # no DTensor; as above
        return None
    return _trusted_grads(known, found)


def _trusted_grads(known: TensorList, found: tuple[list[Tensor], Contents] | None) -> TensorList | None:
    if found is None or without_memory(found[0]):
        return None
    owner, grads, contents = describe_list(known), TensorList(found[0]), found[1]
    if contents.has_float64 or not _is_dense(grads, contents, known):
        return None
    _described(grads, owner.device, contents, owner.owner or owner)
    return grads


def is_current(known: TensorList, tensors: list[Tensor]) -> bool:
    """Whether ``tensors`` are those of ``known``, still where they lay when it was made."""
    return describe_list(known).contents.is_current(tensors)


def are_locals_of(known: TensorList, owners: list[Tensor]) -> bool:
    """Whether ``known`` are the local parts of ``owners``, still where they lay."""
    try:
        return describe_list(known).contents.are_locals_of(owners)
    except AttributeError:  # no DTensor
        return False
