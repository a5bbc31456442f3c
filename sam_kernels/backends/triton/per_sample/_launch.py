"""Launching a kernel whose tensors are a layer's own: a CUDA graph has them in its own memory, so that nobody keeps them alive for it."""

from __future__ import annotations

from typing import Any

import torch

from sam_kernels.backends.triton._device import on
from sam_kernels.backends.triton._launch import options_of
from sam_kernels.backends.triton._requirements import IS_INTERPRETED
from sam_kernels.backends.triton.per_sample._config import Tile

__all__ = ["launch"]


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, tile: Tile | None = None, **constants: Any) -> None:
    """Runs ``programs`` programs on the current stream of ``device``. ``tile``: of the products that a kernel's loop is about."""
    options = options_of(4 if tile is None else tile.num_warps, device)
    if tile is not None and not IS_INTERPRETED:
        options["num_stages"] = 2 if torch.version.hip else tile.num_stages  # AMD's multiprocessors have 64 KB for all buffers
    with on(device):
        kernel[(programs,)](*args, **constants, **options)
