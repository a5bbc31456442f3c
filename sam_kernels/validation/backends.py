"""Backends by name, as ``validate`` and the tests choose them."""

from __future__ import annotations

import torch

from sam_kernels import _dispatch
from sam_kernels._backend import Backend
from sam_kernels.validation.cases import dtypes_for

__all__ = ["AUTOMATIC", "backend_of", "dtypes_of", "has_per_sample", "using"]

AUTOMATIC = "automatic"  # no backend is forced: each row goes to the first backend with kernels for its dtypes


def using(backend: str) -> _dispatch.use_backend:
    """Force a backend within a ``with`` block; ``AUTOMATIC`` forces none."""
    return _dispatch.use_backend(None if backend == AUTOMATIC else backend)


def backend_of(name: str, device: str = "cpu") -> Backend:
    """Return the backend for tensors on ``device``: the preferred one for ``AUTOMATIC``."""
    with using(name):
        return _dispatch.select(torch.device(device).type)


def dtypes_of(backend: str, device: str = "cpu") -> list[str]:
    """Return the names of the dtypes to check a backend with. The automatic choice depends on the row in the mixed case alone."""
    return ["mixed"] if backend == AUTOMATIC else dtypes_for(backend_of(backend, device).dtypes)


def has_per_sample(backend: str, device: str = "cpu") -> bool:
    """Return whether a backend has the operations of gradient norms per sample for ``device``."""
    with using(backend):
        try:
            _dispatch.select_per_sample(torch.device(device).type)
        except RuntimeError:
            return False
    return True
