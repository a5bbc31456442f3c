"""The rank's own part of a DTensor, which is what operations read and write. No operation of torch is dispatched on a DTensor in a step."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from sam_kernels._sharding import is_dtensor

__all__ = ["as_owner", "local_grad", "local_of"]


def local_of(tensor: Tensor) -> Tensor:
    """The rank's part of a DTensor; any other tensor itself.

    The same object at every call, until FSDP2 replaces it. ``to_local()`` returns a new view of a parameter at every call.
    """
    local: Tensor = tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]  # a DTensor's
    return local


def local_grad(param: Tensor, grad: Tensor) -> Tensor:
    """The rank's part of a gradient of ``param``, with the placements of ``param``: redistributed first where it has others.

    Raises TypeError for a gradient that is a DTensor where ``param`` is none, or the other way round.
    """
    if is_dtensor(grad) is not is_dtensor(param):
        kind, other = ("a DTensor", "none") if is_dtensor(grad) else ("an ordinary tensor", "a DTensor")
        raise TypeError(f"is {kind} and the parameter is {other}")
    if not is_dtensor(param):
        return grad
    owner: Any = param
    given: Any = grad
    if given._spec is not owner._spec and (given.placements != owner.placements or given.device_mesh != owner.device_mesh):
        given = given.redistribute(owner.device_mesh, owner.placements)
    part: Any = given._local_tensor
    local: Tensor = part.wait() if hasattr(part, "wait") else part  # a collective that is still under way
    return local


def as_owner(owner: Tensor, local: Tensor) -> Tensor:
    """``local``, laid out as ``owner`` is: a DTensor with its mesh and placements where ``owner`` is one, otherwise ``local`` itself."""
    if not is_dtensor(owner):
        return local
    made: Any = sys.modules["torch.distributed.tensor"].DTensor
    like: Any = owner
    wrapped: Tensor = made.from_local(local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
    return wrapped
