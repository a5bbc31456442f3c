"""From the beginning of a module's call to its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

__all__ = ["Extent", "extent_of"]


@dataclass(frozen=True, eq=False)
class Extent:
    """One call of a module, from its beginning to its end, that has parameters of layers inside it under names of its own."""

    aliased: frozenset[int]  # ids of parameters
    inside: frozenset[int]  # ids of modules


def extent_of(module: nn.Module, params: Mapping[str, nn.Parameter]) -> Extent | None:
    """None where nothing inside the module has one of its own parameters."""
    inner = [each for each in module.modules() if each is not module]
    ids = {id(param) for param in params.values()}
    aliased = frozenset(id(param) for each in inner for param in each._parameters.values() if id(param) in ids)
    return Extent(aliased, frozenset(map(id, inner))) if aliased else None
