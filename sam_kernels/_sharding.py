"""DTensors: the rank's own parts of tensors and gradients, read without dispatching anything. The modules of ``fully_shard``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["READS_PLAINLY", "is_dtensor", "local_grads_alike", "locals_of", "sharded_modules"]

# Within it ``grad`` and ``_version`` of a DTensor are read in half the time: torch does not look for a ``__torch_function__`` first, which
# DTensors have turned off.
READS_PLAINLY = torch._C.DisableTorchFunctionSubclass

_LOCAL = attrgetter("_local_tensor")
_SPEC = attrgetter("_spec")


def is_dtensor(tensor: object) -> bool:
    """Whether ``tensor`` is a DTensor. Does not import ``torch.distributed.tensor``: without that module there is none."""
    if type(tensor) in (Tensor, nn.Parameter):  # the usual case first
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def locals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The rank's parts. A list whose first tensor is no DTensor is returned as it is: lists are of one kind."""
    if not tensors or not is_dtensor(tensors[0]):
        return tensors if isinstance(tensors, list) else list(tensors)
    return list(map(_LOCAL, tensors))


def local_grads_alike(owners: Sequence[Any]) -> list[Tensor] | None:
    """The rank's parts of the gradients of DTensors; None where one has no gradient, or one that lies otherwise than its parameter."""
    with READS_PLAINLY():
        grads = [owner.grad for owner in owners]
    try:
        return list(map(_LOCAL, grads)) if list(map(_SPEC, grads)) == list(map(_SPEC, owners)) else None
    except AttributeError:  # None, or an ordinary tensor
        return None


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules of ``fully_shard`` in ``model``, inside of wrappers such as torch.compile's too."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]
