"""A binary tree of sums: changes of leaves, and leaves found by their share of a total, in O(log n) each, for a whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SumTree"]


class SumTree:
    """Over n leaves with k numbers each, k sums at every node; zeros at first.

    Node 1 is the root, 2 i and 2 i + 1 are the children of i, the leaves come last. A changed leaf has every sum above it computed anew
    from its two children: sums never drift, and are the same bits whichever changes led to the leaves that there are.
    """

    def __init__(self, n: int, k: int) -> None:
        self._depth = (n - 1).bit_length()
        self._nodes = torch.zeros(2 << self._depth, k, dtype=torch.float64)
        self.leaves = self._nodes[1 << self._depth :][:n]  # (n, k), a view to read

    @property
    def total(self) -> Tensor:  # (k,)
        return self._nodes[1]

    def set_(self, indices: Tensor, values: Tensor) -> None:  # (m,) int64 without duplicates, (m, k)
        nodes = indices + (1 << self._depth)
        self._nodes[nodes] = values
        for _ in range(self._depth):
            nodes = torch.unique(nodes // 2)
            self._nodes[nodes] = self._nodes[2 * nodes] + self._nodes[2 * nodes + 1]

    def find(self, points: Tensor, factors: Tensor) -> Tensor:  # (m,) in [0, total @ factors), (k,) -> (m,) int64
        """The leaf at each point, where leaf i is as long as ``leaves[i] @ factors``: never one of no length, unless all are."""
        nodes, points = torch.ones_like(points, dtype=torch.int64), points.clone()
        for _ in range(self._depth):
            left, right = self._nodes[2 * nodes] @ factors, self._nodes[2 * nodes + 1] @ factors
            goes_right = (points >= left) & (right > 0)  # rounding may leave a point beyond the end of both
            points -= torch.where(goes_right, left, 0.0)
            nodes = 2 * nodes + goes_right
        return nodes - (1 << self._depth)
