"""The arguments of one call of an operation, as data that can be copied to another device or another precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Problem"]


@dataclass
class Problem:
    """The arguments of one call: ``lists`` in the order of the operation's positional arguments, then keywords."""

    op: str
    lists: dict[str, list[Tensor | None]]
    kwargs: dict[str, Any]

    def clone(self, device: str = "cpu") -> Problem:
        """The same bits in memory of its own on a device, laid out alike: guards stay guards, shared memory stays shared."""
        copies: dict[int, Tensor] = {}
        tensors = {id(t): _clone(t, device, copies) for tensors in self.lists.values() for t in tensors}
        lists = {name: [tensors[id(t)] for t in given] for name, given in self.lists.items()}
        kwargs = {name: value.to(device, copy=True) if isinstance(value, Tensor) else value for name, value in self.kwargs.items()}
        return Problem(self.op, lists, kwargs)

    def double(self) -> Problem:
        """Everything in float64, contiguous. One tensor in two lists stays one."""
        wide = {id(t): t.to(torch.float64).clone() for tensors in self.lists.values() for t in tensors if t is not None}
        lists = {name: [None if t is None else wide[id(t)] for t in tensors] for name, tensors in self.lists.items()}
        return Problem(self.op, lists, {k: v.to(torch.float64).clone() if isinstance(v, Tensor) else v for k, v in self.kwargs.items()})


def _clone(tensor: Tensor | None, device: str, copies: dict[int, Tensor]) -> Tensor | None:
    """``copies``: of the allocations met so far."""
    if tensor is None:
        return None
    whole = tensor if tensor._base is None else tensor._base
    if whole._cdata not in copies:
        copies[whole._cdata] = whole.to(device, copy=True)
    copy = copies[whole._cdata]
    return copy if tensor._base is None else copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
