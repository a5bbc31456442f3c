"""The dtypes of a backend, and the classes of its operations."""

from __future__ import annotations

import pytest
import torch

from sam_kernels import operations
from sam_kernels.operations import Operation
from sam_kernels.validation.backends import backend_of

__all__ = ["OPERATIONS", "require_dtype", "widest"]

OPERATIONS: dict[str, type[Operation]] = {op.name: op for op in operations.OPERATIONS}


def require_dtype(name: str, dtype: torch.dtype) -> None:
    """Skips the test where a backend has no kernels for a dtype."""
    supported = backend_of(name).dtypes
    if supported is not None and dtype not in supported:
        pytest.skip(f"backend {name} has no kernels for {dtype}")


def widest(name: str) -> torch.dtype:
    """float64 where the backend has it."""
    supported = backend_of(name).dtypes
    return torch.float64 if supported is None or torch.float64 in supported else torch.float32
