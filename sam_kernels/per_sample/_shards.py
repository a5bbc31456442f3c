"""Models of ``fully_shard``: a layer reads whole parameters, which are gathered for its call; what the model holds are a rank's parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from sam_kernels._sharding import is_dtensor, sharded_modules

__all__ = ["WholeParams"]


class WholeParams:
    """What layers read in the place of parameters that are DTensors. Without such parameters every method does nothing.

    Frees what the modules of ``fully_shard`` have gathered, so that the model's parameters are the rank's parts when they are looked at.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        sharded = [] if model is None else sharded_modules(model)
        for module in sharded:
            module.reshard()
        self._own = {id(param) for param in model.parameters()} if model is not None and sharded else set()
        self._of: dict[int, dict[int, Tensor]] = {}  # by the id of a part, the whole parameters that were read for it, by theirs

    def read_by(self, name: str, module: nn.Module, params: Mapping[str, nn.Parameter]) -> Mapping[str, nn.Parameter]:
        """What the module reads now in the place of ``params``, which are its own or those of modules in it, under the same names.

        Raises NotImplementedError where that is a DTensor too: under tensor parallelism a sample's gradient lies on several ranks.
        """
        if not any(map(is_dtensor, params.values())):
            return params
        read: dict[str, nn.Parameter] = {}
        for each, part in params.items():
            owner, _, last = each.rpartition(".")
            whole = read[each] = getattr(module.get_submodule(owner), last)
            if is_dtensor(whole):
                raise NotImplementedError(
                    f"GradNorms: {name}: parameter {each} is a DTensor while the layer is called (tensor parallelism): a sample's gradient "
                    "lies on several ranks; only the shards of fully_shard are supported, which layers read whole"
                )
            self._of.setdefault(id(part), {})[id(whole)] = whole
        return read

    def of(self, part: Tensor) -> list[Tensor]:
        """The whole parameters that were read in the place of a part; of no part, the parameter itself."""
        return list(self._of.get(id(part), {}).values()) if is_dtensor(part) else [part]

    def may_be_among(self, leaves: Iterable[int]) -> bool:
        """Whether one of these ids of leaves may be that of a part whose module was not called: of no parameter that is known."""
        return any(leaf not in self._own and all(leaf not in wholes for wholes in self._of.values()) for leaf in leaves)

    def add_readers(self, readers: dict[int, list[Any]]) -> None:
        """Counts the nodes that read a whole parameter as readers of the part."""
        for part, wholes in self._of.items():
            readers[part] = [*readers.get(part, ()), *(node for whole in wholes for node in readers.get(whole, ()))]

    def refuse(self, name: str, params: Iterable[nn.Parameter]) -> None:
        """Raises NotImplementedError for a DTensor among the parameters of a module that is to be run again by ``torch.func``."""
        if any(map(is_dtensor, params)):
            raise NotImplementedError(
                f"GradNorms: {name} has no rule, and over shards unsupported='vmap' cannot run it again; leave the option out, so that its "
                "parameters are looked for in the graph, or give it a rule with register_rule"
            )
