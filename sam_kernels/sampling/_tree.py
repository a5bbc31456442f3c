"""A binary tree of sums: changes of leaves, and leaves found by their share of a total, in O(log n) each, for a whole batch at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["SumTree"]


class SumTree:
    """Over n leaves with k numbers each, k sums at every node; zeros at first.

    Node 1 is the root, 2 i and 2 i + 1 are the children of i, the leaves come last. A changed leaf has every sum above it computed anew
    from its two children: sums never drift, and are the same bits whichever changes led to the leaves that there are.
    """

    def __init__(self, n: int, k: int) -> None:
        self._n, self._depth = n, (n - 1).bit_length()
        self._nodes = torch.zeros(2 << self._depth, k, dtype=torch.float64, device="cpu")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Tensors that come from another process are shared with it: a copy has its own."""
        self.__dict__.update(state)
        self._nodes = self._nodes.clone()

    @property
    def leaves(self) -> Tensor:  # (n, k), to read: a view, made anew as pickle would part one that is kept from the nodes
        return self._nodes[1 << self._depth :][: self._n]

    @property
    def total(self) -> Tensor:  # (k,)
        return self._nodes[1]

    def set_(self, indices: Tensor, values: Tensor) -> None:  # (m,) int64 without duplicates, (m, k)
        nodes = indices + (1 << self._depth)
        self._nodes[nodes] = values
        children = self._children()
        if len(indices) * self._depth > len(self._nodes):  # all of a level is less than the ways up
            for level in reversed(range(self._depth)):
                both = children[1 << level : 2 << level]
                torch.add(both[:, 0], both[:, 1], out=self._nodes[1 << level : 2 << level])
            return
        for _ in range(self._depth):
            nodes = nodes // 2  # one that is there twice gets the same value twice
            both = children[nodes]
            self._nodes[nodes] = both[:, 0] + both[:, 1]

    def find(self, points: Tensor, factors: Tensor) -> Tensor:  # (m,) in [0, total @ factors), (k,) -> (m,) int64
        """The leaf at each point, where leaf i is as long as ``leaves[i] @ factors``: never one of no length, unless all are."""
        nodes, points, children = torch.ones_like(points, dtype=torch.int64), points.clone(), self._children()
        for _ in range(self._depth):
            left, right = (children[nodes] @ factors).unbind(1)
            goes_right = (points >= left) & (right > 0)  # rounding may leave a point beyond the end of both
            points -= torch.where(goes_right, left, 0.0)
            nodes = 2 * nodes + goes_right
        return nodes - (1 << self._depth)

    def _children(self) -> Tensor:  # (nodes / 2, 2, k), a view: both children of node i at i
        return self._nodes.view(-1, 2, self._nodes.shape[1])
