"""The SAM optimizer inside of what a framework has put around it."""

from __future__ import annotations

from typing import Any

from sam_kernels.optim.sam import SAM

__all__ = ["find_sam"]

_DEEPEST = 8  # wrappers


def find_sam(optimizer: Any) -> SAM | None:
    """The optimizer itself, or the one inside of wrappers that hold it as ``optimizer``, as accelerate's and Lightning's do; else None."""
    for _ in range(_DEEPEST):
        if isinstance(optimizer, SAM):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None
