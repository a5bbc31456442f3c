"""A parameter that a module keeps under a second name: its own ``self.w``, and the weight of a layer inside it.

By ``torch.func`` such a module's gradient contains every use inside it, that of the layer too, whose call is recorded as well. One of the
two has to go. The graph counts the reads: where the layers' calls account for all of them the module's own name is never read, and the
layers' rules are right; otherwise the module's gradient counts, and the layers' calls inside it do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from sam_kernels.per_sample._call import Call

__all__ = ["distinct", "is_alias_alone", "settle"]


def distinct(params: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Each parameter by the first of its names."""
    seen: dict[int, str] = {}
    for name, param in params.items():
        seen.setdefault(id(param), name)
    return {name: params[name] for name in seen.values()}


def is_alias_alone(params: Mapping[str, nn.Parameter], model: nn.Module, built_in: Any) -> bool:
    """Whether a module without a rule only holds parameters of layers elsewhere whose reads are counted, as one for each call.

    ``built_in(module)``: True for such a layer, False for one whose reads are not counted, None for a module without a rule.
    """
    counted: set[int] = set()
    others: set[int] = set()
    for module in model.modules():
        kind = built_in(module)
        if kind is not None:
            (counted if kind else others).update(id(param) for param in module._parameters.values())
    return all(id(param) in counted and id(param) not in others for param in params.values())


def settle(calls: Sequence[Call], readers: Mapping[int, Sequence[Any]]) -> list[Call]:
    """The calls with each use of a parameter in one of them."""
    outer = [call for call in calls if call.extent is not None]
    if not outer:
        return list(calls)
    counted = Counter(id(param) for call in calls if call.reads_once for param in call.params.values())
    for call in outer:
        assert call.extent is not None
        needed = {key for key in call.extent.aliased if len(readers.get(key, ())) != counted[key]}
        call.params = dict(_without(call, call.extent.aliased - needed))
        for inner in calls:
            if call.extent in inner.extents:
                inner.params = dict(_without(inner, needed))
    return [call for call in calls if call.params]


def _without(call: Call, ids: Collection[int]) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, param) for name, param in call.params.items() if id(param) not in ids)
