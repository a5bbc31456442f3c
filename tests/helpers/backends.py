"""The dtypes of a backend."""

from __future__ import annotations

import pytest
import torch

from sam_kernels.validation.backends import module_of

__all__ = ["require_dtype", "widest"]


def require_dtype(name: str, dtype: torch.dtype) -> None:
    """Skips the test where a backend has no kernels for a dtype."""
    supported = module_of(name).DTYPES
    if supported is not None and dtype not in supported:
        pytest.skip(f"backend {name} has no kernels for {dtype}")


def widest(name: str) -> torch.dtype:
    """float64 where the backend has it."""
    supported = module_of(name).DTYPES
    return torch.float64 if supported is None or torch.float64 in supported else torch.float32
