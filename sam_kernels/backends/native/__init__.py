"""Kernels compiled ahead of time: C++ for CPU tensors (``cpu``), CUDA for those on NVIDIA devices (``cuda``).

Each module raises ImportError with the reason where it was not compiled, or tells it as ``REASON_MISSING``.
"""

import os

__all__ = ["CUDA_ON_HOST"]

# The CUDA kernels compiled for the host take the place of the CPU's: how their arithmetic is tested without a device.
CUDA_ON_HOST = os.environ.get("SAM_KERNELS_CUDA_ON_HOST") == "1"
