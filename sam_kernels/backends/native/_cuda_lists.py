"""The compiled module of the CUDA kernels, and what its functions are given: lists as it knows them, streams, memory for sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sam_kernels.backends.native import CUDA_ON_HOST
from sam_kernels.backends.native._lists import Lists

try:
    if CUDA_ON_HOST:
        from sam_kernels import _cuda_on_host as _cuda
    else:
        from sam_kernels import _cuda  # type: ignore[no-redef]  # the same functions
except ImportError as error:
    raise ImportError(f"the compiled CUDA module of sam_kernels cannot be imported ({error}); reinstall with CUDA's nvcc") from error

__all__ = ["_cuda", "_lists", "_stream", "_sums"]

_lists = Lists(_cuda)


def _stream(device: torch.device) -> int:
    return 0 if CUDA_ON_HOST else torch.cuda.current_stream(device).cuda_stream


def _sums(described: Any, device: torch.device, *, slice_sizes: Sequence[int] | None = None, of_chunk: int = 1) -> Tensor:
    """(chunks * of_chunk,) float64, for partial sums. Made anew each time: steps on several streams must not share it."""
    return torch.empty(_cuda.count_sums(described, slice_sizes) * of_chunk, dtype=torch.float64, device=device)
