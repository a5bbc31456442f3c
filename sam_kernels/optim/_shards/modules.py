"""FSDP2's modules: what they have gathered must not outlive the weights that it was gathered from."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from sam_kernels._local_parts import is_dtensor

__all__ = ["GatheredModules"]


class GatheredModules:
    """The modules of ``fully_shard`` that hold some of an optimizer's parameters.

    A module keeps its gathered parameters after ``set_reshard_after_backward(False)``, and a root module after a forward pass without a
    backward pass. Its next forward pass would then not see that the shards were written.
    """

    def __init__(self, params: Iterable[Tensor] = ()) -> None:
        ours = {id(param) for param in params if is_dtensor(param)}
        self._modules: list[weakref.ref[nn.Module]] = []
        for module in _all_sharded_modules() if ours else []:
            module.reshard()  # its parameters are then the shards
            if not ours.isdisjoint(map(id, module.parameters())):
                self._modules.append(weakref.ref(module))

    def reshard(self) -> None:
        """Frees what the modules have gathered. Call after every write of the shards: 1 µs a module."""
        for reference in self._modules:
            module: Any = reference()
            if module is not None:
                module.reshard()


def _all_sharded_modules() -> list[Any]:
    """Every module of this process that ``fully_shard`` was called with. Raises RuntimeError where torch does not list them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not hasattr(fsdp, "FSDPModule"):
        return []
    try:
        from torch.distributed._composable_state import _module_state_mapping as states  # torch has no public list of them
    except ImportError as error:
        raise RuntimeError("SAM: this version of torch does not list its fully_shard modules, whose shards SAM writes") from error
    return [module for module in list(states) if isinstance(module, fsdp.FSDPModule)]
