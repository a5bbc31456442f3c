"""What the tests of a device run on, and with which kernels."""

from __future__ import annotations

import os

import torch

from sam_kernels._dispatch import reason_missing
from sam_kernels.backends.native import CUDA_ON_HOST

__all__ = ["DEVICE", "KERNELS", "reason_without", "reason_without_device"]

DEVICE = os.environ.get("SAM_KERNELS_TEST_DEVICE", "cuda")  # cpu: a dry run
KERNELS = ("native", "triton")  # backends with kernels of their own for a device


def reason_without(backend: str) -> str | None:
    """Why there are no such kernels for the device, or, in a dry run, nothing that stands in for them."""
    if backend == "native" and DEVICE == "cpu" and not CUDA_ON_HOST:
        return "its C++ kernels are tested elsewhere; SAM_KERNELS_CUDA_ON_HOST=1 makes a dry run of those for CUDA"
    return reason_missing(backend, DEVICE)


def reason_without_device() -> str | None:
    """Why there is nothing to test at all."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    reasons = {backend: reason_without(backend) for backend in KERNELS}
    return None if None in reasons.values() else "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
