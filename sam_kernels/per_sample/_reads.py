"""Checks that every read of a parameter belongs to a recorded call. A read past the parameter's layer would be missing in the norm.

A layer of the package's rules reads each parameter once a call. A module with a rule of the user's, or by ``torch.func``, may read one
as often as it likes while it is called: autograd numbers its nodes as they are made, so a read belongs to the call in whose time it was
made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sam_kernels.per_sample._call import Call
from sam_kernels.per_sample._graph import edges_of

__all__ = ["check_reads", "now"]


def _number_of_a_node() -> int:
    with torch.enable_grad():
        return int(torch.zeros(1, requires_grad=True).view(1).grad_fn._sequence_nr()) + 1  # type: ignore[union-attr]


# The number of the next node. Not public: without it, a node is made to have its number.
now: Callable[[], int] = getattr(torch._C._autograd, "_get_sequence_nr", _number_of_a_node)


def check_reads(params: Iterable[tuple[str, nn.Parameter]], calls: Sequence[Call], readers: Mapping[int, Sequence[Any]], root: Any) -> None:
    """Raise RuntimeError for a parameter that the losses read outside the calls that have it, or inside one but past its output."""
    having: dict[int, list[Call]] = {}  # a call twice, if it has the parameter by two names
    for call in calls:
        for param in call.params.values():
            having.setdefault(id(param), []).append(call)
    has_spans = any(call.span is not None for call in calls)
    free = [call for call in calls if call.span is not None and call.merged is None]  # torch's attention keeps nothing as an attribute
    past = _reached_past(root, free) if free else set()
    for name, param in params:
        found, mine = readers.get(id(param), ()), having.get(id(param), ())
        spans = [call.span for call in mine if call.span is not None] if has_spans else []
        if not spans:
            if len(found) > len(mine):
                raise _read_past(name, len(found), len(mine))
            continue
        inside = [node for node in found if _is_in(node._sequence_nr(), spans)]
        seen = sum(not _is_in(call.first_order, spans) for call in mine if call.span is None)
        if len(found) - len(inside) > seen:
            raise _read_past(name, len(found), len(inside) + seen)
        kept = [call.span for call in mine if call.span is not None and call.merged is None]
        if any(node in past and _is_in(node._sequence_nr(), kept) for node in inside):
            raise RuntimeError(
                f"GradNorms: the losses read {name} inside its module, but not by way of the module's output (a tensor kept as an "
                "attribute, perhaps): return that tensor as one of the outputs"
            )


def _is_in(number: int, spans: Sequence[tuple[int, int]]) -> bool:
    return any(first <= number < last for first, last in spans)


def _reached_past(root: Any, calls: Sequence[Call]) -> set[Any]:
    """The nodes that ``root`` leads to by other ways than through these calls' outputs."""
    outputs = {node for call in calls for node in call.nodes if node is not None}
    return {root, *(child for _, child in edges_of(root, outputs))} - outputs


def _read_past(name: str, reads: int, seen: int) -> RuntimeError:
    return RuntimeError(
        f"GradNorms: the losses read {name} {reads} times, of which {seen} are calls of its layer inside the `with` block: call the layer "
        "rather than its forward method or a function of its weight, and leave penalties on weights out of the losses"
    )
