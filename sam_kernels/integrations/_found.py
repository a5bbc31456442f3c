"""The SAM optimizer inside of what a framework has put around it."""

from __future__ import annotations

from typing import Any

from sam_kernels.optim.sam import SAM

__all__ = ["find_sam"]

_DEEPEST = 8  # wrappers


def find_sam(optimizer: Any) -> SAM | None:
    """The optimizer itself, or the one inside of wrappers that hold it, as accelerate's, Lightning's and Fabric's do; else None.

    Fabric's wrapper is of SAM's class and has none of its state, so that wrappers are opened first.
    """
    for _ in range(_DEEPEST):
        inner = vars(optimizer).get("_optimizer", vars(optimizer).get("optimizer")) if hasattr(optimizer, "__dict__") else None
        if inner is None:
            break
        optimizer = inner
    return optimizer if isinstance(optimizer, SAM) else None
