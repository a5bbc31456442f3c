"""Which device and stream the next piece of work goes to."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["is_recording", "keep", "on"]

_KEPT: list[object] = []


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current one: Triton launches there, and its stream is the one that is asked about."""
    return nullcontext() if device.type != "cuda" or torch.cuda.current_device() == device.index else torch.cuda.device(device)


def is_recording(device: torch.device) -> bool:
    """Whether the current stream of ``device``, the current one, is being recorded into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def keep(*things: object) -> None:
    """A graph reads and writes these at every replay, and nobody tells us of its end."""
    _KEPT.extend(things)
