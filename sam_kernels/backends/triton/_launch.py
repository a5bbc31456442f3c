"""Launching a kernel, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sam_kernels.backends.triton._requirements import IS_INTERPRETED

__all__ = ["launch", "written"]


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return nullcontext() if device.type != "cuda" or torch.cuda.current_device() == device.index else torch.cuda.device(device)


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, num_warps: int = 4, **constants: Any) -> None:
    """Runs ``programs`` programs of a kernel on the current stream of ``device``; nothing for none.

    No multiplication and addition is fused unless the kernel says so: the same formula then has the same bits as on the CPU, and a pass
    bound by memory does not notice. (Triton's own default has changed between versions.)
    """
    if programs == 0:
        return
    # The interpreter has neither warps nor a compiler.
    options = {} if IS_INTERPRETED else {"num_warps": num_warps, "enable_fp_fusion": False}
    with _on(device):
        kernel[(programs,)](*args, **constants, **options)


def written(params: Sequence[Tensor]) -> None:
    """Tells autograd, so that a backward pass through a graph from before the write is an error and not a wrong gradient."""
    torch.autograd.graph.increment_version(params)
