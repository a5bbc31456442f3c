"""The regime map: the optimizer's share of a step by number of tensors, number of elements and batch, on stacks of linear layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from time import monotonic
from typing import Any

from bench.providers import REFERENCE
from bench.training.measure import Say, measure
from bench.training.models import stack
from bench.training.runs import BASE, LOOP

__all__ = ["BATCHES", "ELEMENTS", "TENSORS", "measure_map"]

TENSORS, ELEMENTS, BATCHES = (10, 100, 1000), (100_000, 1_000_000, 10_000_000), (1, 16, 256)
QUICK = ((10, 100), (100_000,), BATCHES)


def measure_map(*, seconds: float, rounds: int | None, say: Say, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Yield rows of kind "regime": base, sam_kernels and the usual loop, AdamW. ``tensors`` and ``elements`` are the cell's place."""
    cells = list(itertools.product(*(QUICK if quick else (TENSORS, ELEMENTS, BATCHES))))
    end = monotonic() + seconds
    for number, (tensors, elements, batch) in enumerate(cells):
        share = (end - monotonic()) / (len(cells) - number)
        kind = stack(tensors, elements, batch)
        for row in measure(kind.title, kind, (BASE, REFERENCE, LOOP), seconds=share, rounds=rounds, say=say, quick=quick):
            yield {**row, "kind": "regime", "tensors": tensors, "elements": elements}
