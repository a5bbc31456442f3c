"""Products of test cases, and the part of a product in which every pair of values still occurs."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

__all__ = ["covering_pairs", "in_turns"]

Pair = tuple[tuple[str, Hashable], tuple[str, Hashable]]


def in_turns(values: Sequence[Any], *axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The product of ``axes``, each element with one of ``values`` in front: every pair of a value and an element of an axis occurs where
    the other axes together have at least as many elements as there are values."""
    indices = itertools.product(*(range(len(axis)) for axis in axes))
    return [(values[sum(places) % len(values)], *(axis[i] for axis, i in zip(axes, places, strict=True))) for places in indices]


def covering_pairs(rows: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Return the indices, ascending, of rows that together hold every pair of values that occurs in ``rows``.

    A row maps the name of an axis to its value. The choice is greedy: each time the first of the rows with most pairs that are still
    missing. It depends on the rows and their order alone. Rows of fewer than two axes are all chosen.
    """
    pairs: list[set[Pair]] = [set(itertools.combinations(sorted(row.items(), key=lambda item: item[0]), 2)) for row in rows]
    chosen = [i for i, own in enumerate(pairs) if not own]
    missing = set().union(*pairs)
    queue = [(-len(own), i) for i, own in enumerate(pairs) if own]  # by pairs that were missing when a row was last looked at
    heapq.heapify(queue)
    while missing:
        least, i = heapq.heappop(queue)
        gain = len(pairs[i] & missing)
        if gain < -least:  # others may have more by now
            heapq.heappush(queue, (-gain, i))
            continue
        chosen.append(i)
        missing -= pairs[i]
    return sorted(chosen)
