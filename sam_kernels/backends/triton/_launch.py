"""Launching a kernel, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sam_kernels.backends.triton._requirements import IS_INTERPRETED

__all__ = ["launch", "warps_of", "written"]


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return nullcontext() if device.type != "cuda" or torch.cuda.current_device() == device.index else torch.cuda.device(device)


def warps_of(num_warps: int, warp_size: int) -> int:
    """Warps of ``warp_size`` threads that have as many as ``num_warps`` of 32: elements a thread, and so widths of accesses, stay."""
    return max(1, num_warps * 32 // warp_size)


@cache
def _warp_size(device: torch.device) -> int:
    size: int = torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" and torch.version.hip else 32
    return size


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, num_warps: int = 4, **constants: Any) -> None:
    """Runs ``programs`` programs of a kernel on the current stream of ``device``; nothing for none.

    No multiplication and addition is fused unless the kernel says so: the same formula then has the same bits as on the CPU, and a pass
    bound by memory does not notice. (Triton's own default has changed between versions.)
    """
    if programs == 0:
        return
    # The interpreter has neither warps nor a compiler.
    options = {} if IS_INTERPRETED else {"num_warps": warps_of(num_warps, _warp_size(device)), "enable_fp_fusion": False}
    with _on(device):
        kernel[(programs,)](*args, **constants, **options)


def written(params: Sequence[Tensor]) -> None:
    """Tells autograd, so that a backward pass through a graph from before the write is an error and not a wrong gradient."""
    torch.autograd.graph.increment_version(params)
