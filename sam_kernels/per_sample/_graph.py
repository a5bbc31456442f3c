"""Walks through autograd's graph: where a backward pass may stop, which nodes read a parameter, and where rows may change places."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["REORDERING", "Graph", "edges_of", "graph_of", "nodes_of"]


def nodes_of(operations: str, suffix: str = "Backward0") -> frozenset[str]:
    """The names of the nodes that autograd makes for these operations."""
    return frozenset(f"{name}{suffix}" for name in operations.split())


# Nodes whose saved indices or dimensions show whether rows stay where they are. Looked for in the whole graph.
REORDERING = nodes_of("Sort Topk Index IndexSelect Gather Flip Roll Take MaskedSelect")
_CAST = "ToCopyBackward0"
_CHECKPOINT = "CheckpointFunctionBackward"
_Leaf: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]  # not declared


@dataclass
class Graph:
    """``ends``: the nodes of ``reached`` that lead to no other of them."""

    root: Any
    reached: set[Any] = field(default_factory=set)
    ends: set[Any] = field(default_factory=set)
    readers: dict[int, list[Any]] = field(default_factory=dict)  # the nodes that read each leaf, by its id
    leads: dict[Any, bool] = field(default_factory=dict)  # whether a node is one of ``reached`` or leads to one
    reordering: list[Any] = field(default_factory=list)  # nodes that may put rows into another order


def edges_of(root: Any, ends: Collection[Any] = ()) -> Iterator[tuple[Any, Any]]:
    """Every (node, child) of the graph below ``root``, once. Nothing below the nodes of ``ends`` is visited."""
    seen, stack = {root}, [] if root in ends else [root]
    while stack:
        node = stack.pop()
        for child, _ in node.next_functions:
            if child is None:
                continue
            yield node, child
            if child not in seen:
                seen.add(child)
                if child not in ends:
                    stack.append(child)


def graph_of(root: Any, nodes: Collection[Any]) -> Graph:
    """Walk from ``root`` to the leaves and note which of ``nodes`` are reached.

    A backward pass towards ``ends`` runs through all the others, and hands over only the gradients of the ends: what comes by at the others
    is gone once it has been used.

    Raises RuntimeError for a reentrant checkpoint around trainable parameters.
    """
    graph = Graph(root)
    leads, readers = graph.leads, graph.readers
    stack: list[tuple[Any, list[Any] | None]] = [(root, None)]
    while stack:
        node, children = stack.pop()
        if children is None:
            if node in leads:
                continue
            leads[node] = False  # there are no cycles: only keeps the node from being expanded twice
            children = [child for child, _ in node.next_functions if child is not None]
            name = type(node).__name__
            if name in REORDERING:
                graph.reordering.append(node)
            elif name == _CHECKPOINT:
                _refuse_checkpoint(node)
            if name != _CAST or _cast_leaf(node) is None:
                for child in children:
                    kind = type(child)
                    leaf = child if kind is _Leaf else _cast_leaf(child) if kind.__name__ == _CAST else None
                    if leaf is not None:
                        readers.setdefault(id(leaf.variable), []).append(node)
            stack.append((node, children))
            stack += [(child, None) for child in children if child not in leads]
            continue
        below = any(leads[child] for child in children)
        leads[node] = below or node in nodes
        if node in nodes:
            graph.reached.add(node)
            if not below:
                graph.ends.add(node)
    return graph


def _cast_leaf(node: Any) -> Any:
    """The leaf that a cast reads; None for a cast of anything else. Autocast casts a weight once: a read of the cast is one of the leaf."""
    child = node.next_functions[0][0]
    return child if type(child) is _Leaf else None


def _refuse_checkpoint(node: Any) -> None:
    """Its own backward pass makes the gradients of the parameters inside, and not every layer in it is seen when it is called."""
    function = getattr(node, "run_function", None)
    module = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    if isinstance(module, nn.Module) and not any(param.requires_grad for param in module.parameters()):
        return
    raise RuntimeError("GradNorms: the losses come through a reentrant checkpoint, which hides gradients; pass use_reentrant=False")
