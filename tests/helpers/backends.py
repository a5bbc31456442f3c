"""What a test must know of a backend."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from sam_kernels import _dispatch

__all__ = ["module_of", "require_dtype", "widest"]


def module_of(name: str) -> ModuleType:
    """The backend as it is chosen for CPU tensors when it is asked for."""
    with _dispatch.use_backend(name):
        return _dispatch.select("cpu")


def require_dtype(name: str, dtype: torch.dtype) -> None:
    """Skips the test where a backend has no kernels for a dtype."""
    supported = module_of(name).DTYPES
    if supported is not None and dtype not in supported:
        pytest.skip(f"backend {name} has no kernels for {dtype}")


def widest(name: str) -> torch.dtype:
    """float64 where the backend has it."""
    supported = module_of(name).DTYPES
    return torch.float64 if supported is None or torch.float64 in supported else torch.float32
