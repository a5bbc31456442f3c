"""Lists that the operations take unchecked. Torch's own operations take any strides and watch where tensors lie."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from sam_kernels._memory_of import without_memory
from sam_kernels._sharding import local_grads_alike, locals_of
from sam_kernels._tensor_list import TensorList

__all__ = ["are_locals_of", "current_grads", "current_local_grads", "describe", "is_current", "trust"]


def describe() -> str:
    """One line for ``python -m sam_kernels info``."""
    return f"torch {torch.__version__}, any device"


def trust(tensors: Sequence[Tensor], like: TensorList | None = None) -> TensorList | None:
    """A :class:`TensorList` of these tensors, None where one is sparse or has no memory."""
    if without_memory(tensors) or not all(tensor.layout is torch.strided for tensor in tensors):
        return None
    return TensorList(tensors)


def current_grads(known: TensorList, params: list[Tensor]) -> TensorList | None:
    """The gradients of ``params``, trusted; None unless they are the tensors of ``known``, each with a dense gradient."""
    grads = [param.grad for param in params]
    if not is_current(known, params) or not all(grad is not None and grad.layout is torch.strided for grad in grads):
        return None
    return None if without_memory(grads) else TensorList(grads)  # type: ignore[arg-type]  # none of them is None


def is_current(known: TensorList, tensors: list[Tensor]) -> bool:
    """Whether ``tensors`` are those of ``known``."""
    return len(known) == len(tensors) and all(map(operator.is_, known, tensors))


def current_local_grads(known: TensorList, owners: list[Tensor]) -> TensorList | None:
    """:func:`current_grads` of DTensors, whose local parts are ``known``."""
    grads = local_grads_alike(owners) if are_locals_of(known, owners) else None
    return None if grads is None else trust(grads)


def are_locals_of(known: TensorList, owners: list[Tensor]) -> bool:
    """Whether ``known`` are the local parts of ``owners``."""
    return is_current(known, locals_of(owners))
