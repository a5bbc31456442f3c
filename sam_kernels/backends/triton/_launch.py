"""Launching a kernel, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sam_kernels.backends.triton._device import is_recording, keep, on
from sam_kernels.backends.triton._requirements import IS_INTERPRETED

__all__ = ["launch", "options_of", "single", "warps_of", "written"]


def warps_of(num_warps: int, warp_size: int) -> int:
    """Warps of ``warp_size`` threads that have as many as ``num_warps`` of 32: elements a thread, and so widths of accesses, stay."""
    return max(1, num_warps * 32 // warp_size)


@cache
def _warp_size(device: torch.device) -> int:
    size: int = torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" and torch.version.hip else 32
    return size


def options_of(num_warps: int, device: torch.device) -> dict[str, Any]:
    """What every kernel is compiled with.

    No multiplication and addition is fused unless the kernel says so: the same formula then has the same bits as on the CPU, and a pass
    bound by memory does not notice. (Triton's own default has changed between versions.)
    """
    # The interpreter has neither warps nor a compiler.
    return {} if IS_INTERPRETED else {"num_warps": warps_of(num_warps, _warp_size(device)), "enable_fp_fusion": False}


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, num_warps: int = 4, **constants: Any) -> None:
    """Runs ``programs`` programs of a kernel on the current stream of ``device``; nothing for none."""
    if programs == 0:
        return
    options = options_of(num_warps, device)
    with on(device):
        if is_recording(device):
            keep(*args)
        kernel[(programs,)](*args, **constants, **options)


def single(scalar: Tensor | None) -> Tensor | None:
    """A number that a kernel reads, as float32: others are rare, and each type would compile a kernel of its own."""
    return scalar if scalar is None or scalar.dtype is torch.float32 else scalar.to(torch.float32)


def written(params: Sequence[Tensor]) -> None:
    """Tells autograd, so that a backward pass through a graph from before the write is an error and not a wrong gradient."""
    torch.autograd.graph.increment_version(params)
