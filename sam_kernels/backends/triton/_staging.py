"""Addresses on their way to the device: pinned memory that is not written again while a copy from it may be under way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Staging", "upload"]

_RECORDED: list[Tensor] = []  # what CUDA graphs copy from at every replay


def upload(values: Tensor, device: torch.device) -> Tensor:
    """``values``, from the host, on the device: without waiting for it."""
    if device.type == "cpu":
        return values
    pinned = values.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _RECORDED.append(pinned)
    return pinned.to(device, non_blocking=True)


class Staging:
    """Writes blocks of ``count`` numbers into ``target`` without waiting for the device.

    A ring of pinned buffers, each with an event that says when its copy is done; it grows in the rare case that the host runs so far ahead
    that all are in use. One buffer is kept for a CUDA graph: pinning memory while one is recorded is not everywhere allowed.
    """

    def __init__(
        self,
        target: Tensor,  # (n,) int64, on any device
        count: int,
    ) -> None:
        self._target = target
        self._count = count
        self._on_host = target.device.type == "cpu"
        self._ring: list[tuple[Tensor, torch.cuda.Event]] = []
        self._next = 0
        self._reserve: list[Tensor] = []
        if not self._on_host and not torch.cuda.is_current_stream_capturing():
            self._reserve.append(self._pinned())

    def write(self, offset: int, values: Sequence[int]) -> None:
        """target[offset : offset + count] <- values, in the order of the current stream."""
        fresh = torch.tensor(values, dtype=torch.int64)
        destination = self._target[offset : offset + self._count]
        if self._on_host:
            destination.copy_(fresh)
        elif torch.cuda.is_current_stream_capturing():
            buffer = self._reserve.pop() if self._reserve else self._pinned()
            _RECORDED.append(buffer)
            buffer.copy_(fresh)
            destination.copy_(buffer, non_blocking=True)
        else:
            buffer, event = self._free_buffer()
            buffer.copy_(fresh)
            destination.copy_(buffer, non_blocking=True)
            event.record()

    def _free_buffer(self) -> tuple[Tensor, torch.cuda.Event]:
        if self._ring:
            self._next = (self._next + 1) % len(self._ring)
            if self._ring[self._next][1].query():
                return self._ring[self._next]
        self._ring.insert(self._next, (self._pinned(), torch.cuda.Event()))
        return self._ring[self._next]

    def _pinned(self) -> Tensor:
        return torch.empty(self._count, dtype=torch.int64, pin_memory=True)
