"""Products of test cases in which one axis takes turns instead of multiplying."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

__all__ = ["in_turns"]


def in_turns(values: Sequence[Any], *axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The product of ``axes``, each element with one of ``values`` in front: every pair of a value and an element of an axis occurs where
    the other axes together have at least as many elements as there are values."""
    indices = itertools.product(*(range(len(axis)) for axis in axes))
    return [(values[sum(places) % len(values)], *(axis[i] for axis, i in zip(axes, places, strict=True))) for places in indices]
