"""What autograd's graph says: where a backward pass may stop, and how often a parameter is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch

__all__ = ["ends_of"]


_CAST = "ToCopyBackward0"
_Leaf: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]  # not declared


def ends_of(root: Any, nodes: Collection[Any]) -> tuple[set[Any], set[Any], Counter[int]]:
    """Of ``nodes``: those that ``root`` leads to, and of these the ones that lead to no other. How often each leaf is read, by its id.

    A backward pass towards the latter runs through all the others, and hands over only the latter's gradients: what comes by at the others
    is gone once it has been used.
    """
    reached: set[Any] = set()
    leads: dict[Any, bool] = {}  # whether a node is one of ``nodes`` or leads to one
    ends: set[Any] = set()
    reads: Counter[int] = Counter()
    stack: list[tuple[Any, list[Any] | None]] = [(root, None)]
    while stack:
        node, children = stack.pop()
        if children is None:
            if node in leads:
                continue
            leads[node] = False  # there are no cycles: only keeps the node from being expanded twice
            children = [child for child, _ in node.next_functions if child is not None]
            if type(node).__name__ != _CAST or _cast_leaf(node) is None:
                for child in children:
                    kind = type(child)
                    leaf = child if kind is _Leaf else _cast_leaf(child) if kind.__name__ == _CAST else None
                    if leaf is not None:
                        reads[id(leaf.variable)] += 1
            stack.append((node, children))
            stack += [(child, None) for child in children if child not in leads]
            continue
        below = any(leads[child] for child in children)
        leads[node] = below or node in nodes
        if node in nodes:
            reached.add(node)
            if not below:
                ends.add(node)
    return reached, ends, reads


def _cast_leaf(node: Any) -> Any:
    """The leaf that a cast's node has to itself, else None. Autocast casts a weight once: who reads the cast reads the leaf."""
    child = node.next_functions[0][0]
    return child if type(child) is _Leaf else None
