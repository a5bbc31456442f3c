"""FSDP2's modules: what they have gathered must not outlive the weights that it was gathered from."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

__all__ = ["GatheredModules", "all_sharded_modules"]


class GatheredModules:
    """The modules of ``fully_shard`` that hold some of an optimizer's parameters.

    A module keeps its gathered parameters after ``set_reshard_after_backward(False)``, and a root module after a forward pass without a
    backward pass. Its next forward pass would then not see that the shards were written.
    """

    def __init__(self, params: Iterable[Tensor] = ()) -> None:
        ours = {id(param) for param in params}
        self._modules: list[weakref.ref[nn.Module]] = []
        for module in all_sharded_modules() if ours else []:
            before = dict(module.named_parameters())
            module.reshard()  # its parameters are then the shards
            shards = set(map(id, module.parameters()))
            for name, param in before.items():
                if id(param) in ours and id(param) not in shards:
                    raise ValueError(
                        f"SAM: parameter {name!r} is what fully_shard has gathered for a forward pass, not the rank's part; call "
                        f"{type(module).__name__}.reshard() before you take the model's parameters()"
                    )
            if not ours.isdisjoint(shards):
                self._modules.append(weakref.ref(module))

    def reshard(self) -> None:
        """Frees what the modules have gathered. Call after every write of the shards: 1 µs a module."""
        for reference in self._modules:
            module: Any = reference()
            if module is not None:
                module.reshard()

    def abandon_pass(self) -> None:
        """After an exception, which may have come in the middle of a pass: gathered weights are freed, collectives that are under way and
        gradients that are not reduced yet are dropped, so that the next pass begins anew. (:meth:`reshard` alone leaves them to the pass.)
        """
        states = [module()._get_fsdp_state() for module in self._modules if module() is not None]  # type: ignore[operator,union-attr]
        for state in states:
            # A root sees to those inside of it. One that is None has made no pass yet.
            if state._is_root and hasattr(state, "_reset_iter_state"):
                with suppress(RuntimeError):  # collectives of a process group that has failed, which the exception is about
                    state._reset_iter_state()
            for group in getattr(state, "_fsdp_param_groups", ()):
                for param in group.fsdp_params:  # torch 2.13 leaves these, and the next pass would add to them
                    param.unsharded_accumulated_grad = None
                    if hasattr(param, "_unsharded_param"):
                        param._unsharded_param.grad = None

    @property
    def can_abandon_pass(self) -> bool:
        """Whether this version of torch can begin a pass anew after an exception in one."""
        return all(hasattr(module(), "reset_iter_state") for module in self._modules if module() is not None)


def all_sharded_modules() -> list[Any]:
    """Every module of this process that ``fully_shard`` was called with. Raises RuntimeError where torch does not list them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not hasattr(fsdp, "FSDPModule"):
        return []
    try:
        from torch.distributed._composable_state import _module_state_mapping as states  # torch has no public list of them
    except ImportError as error:
        raise RuntimeError("SAM: this version of torch does not list its fully_shard modules, whose shards SAM writes") from error
    return [module for module in list(states) if isinstance(module, fsdp.FSDPModule)]
