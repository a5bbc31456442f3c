"""What torch's sharding has made of tensors and modules. Imports nothing of ``torch.distributed``: a program that has not has neither."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

__all__ = ["is_dtensor", "sharded_modules"]


def is_dtensor(tensor: object) -> bool:
    """Whether ``tensor`` is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules of ``fully_shard`` in ``model``, inside of wrappers such as torch.compile's too."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]
