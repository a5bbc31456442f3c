"""Lists of tensors as a compiled module knows them: pointers, sizes and dtypes, read in one loop in C++ and kept with the list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sam_kernels._memory_of import without_memory
from sam_kernels._sharding import READS_PLAINLY
from sam_kernels._tensor_list import TensorList, is_dense_row

__all__ = ["Lists", "written"]


def written(params: Sequence[Tensor]) -> None:
    """Tells autograd, so that a backward pass through a graph from before the write is an error and not a wrong gradient."""
    torch.autograd.graph.increment_version(params)


class Lists:
    """The lists of one compiled module (``sam_kernels._cpu`` or ``sam_kernels._cuda``)."""

    def __init__(self, module: Any) -> None:
        module.register_types(torch.Tensor, torch.nn.Parameter, (torch.float32, torch.float64, torch.bfloat16, torch.float16))
        self._make = module.TensorList
        self._key: str = module.__name__

    def describe(self, tensors: Sequence[Tensor]) -> Any:
        """The C++ side's description of a list, kept with the list where it can be."""
        if not isinstance(tensors, TensorList):
            return self._make(list(tensors))
        described = tensors.descriptions.get(self._key)
        if described is None:
            described = tensors.descriptions[self._key] = self._make(tensors)
        return described

    def describe_all(self, lists: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
        """:meth:`describe`, by role."""
        return {role: self.describe(tensors) for role, tensors in lists.items()}

    def trust(self, tensors: Sequence[Tensor], like: TensorList | None = None) -> TensorList | None:
        """A :class:`TensorList` of these tensors if every row is dense and in the memory order of ``like``'s (default: its own), else None.

        For owners who already know that layouts, devices and shapes agree: costs a third of a microsecond a tensor.
        """
        if without_memory(tensors):
            return None
        try:
            described = self._make(list(tensors))
        except (RuntimeError, TypeError):  # a sparse tensor, a dtype without kernels: the caller's checks have the words for it
            return None
        return self._trusted(tensors, described, like)

    def _trusted(self, tensors: Sequence[Tensor], described: Any, like: TensorList | None) -> TensorList | None:
        odd = described.non_contiguous
        if like is None:
            dense = all(is_dense_row([tensors[i]]) for i in odd)
        elif odd == self.describe(like).non_contiguous:
            dense = all(tensors[i].stride() == like[i].stride() for i in odd)
        else:
            dense = all(tensor.dim() == 0 for tensor in tensors)  # step counters, beside any parameters
        if not dense:
            return None
        result = TensorList(tensors)
        result.descriptions[self._key] = described
        return result

    def current_grads(self, known: TensorList, params: list[Tensor]) -> TensorList | None:
        """The gradients of ``params``, trusted; None unless these are ``known``'s tensors, unmoved, each with an ordinary gradient."""
        try:
            found = self.describe(known).current_grads(params)
        except (RuntimeError, TypeError):
            return None
        return None if found is None else self._trusted(found[0], found[1], known)

    def current_local_grads(self, known: TensorList, owners: list[Tensor]) -> TensorList | None:
        """:meth:`current_grads` of DTensors, whose local parts are ``known``, in one loop in C++ too."""
        try:
            with READS_PLAINLY():
                found = self.describe(known).current_local_grads(owners)
        except (AttributeError, RuntimeError, TypeError):  # no DTensor; as above
            return None
        return None if found is None else self._trusted(found[0], found[1], known)

    def is_current(self, known: TensorList, tensors: list[Tensor]) -> bool:
        """Whether ``tensors`` are those of ``known``, still where they lay when it was made."""
        current: bool = self.describe(known).is_current(tensors)
        return current

    def are_locals_of(self, known: TensorList, owners: list[Tensor]) -> bool:
        """Whether ``known`` are the local parts of ``owners``, still where they lay."""
        try:
            current: bool = self.describe(known).are_locals_of(owners)
        except AttributeError:  # no DTensor
            return False
        return current
