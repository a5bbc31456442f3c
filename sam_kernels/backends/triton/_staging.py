"""Addresses on their way to the device: pinned memory that is not written again while a copy from it may be under way."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sam_kernels.backends.triton._contents import Contents
from sam_kernels.backends.triton._device import is_recording, keep, on

__all__ = ["Staging", "upload"]

_RESERVED = 2  # the norm's table is used twice a step
_ADDRESS = 8  # bytes


def upload(values: Tensor, device: torch.device) -> Tensor:
    """``values``, from the host, on the device: without waiting for it."""
    if device.type == "cpu":
        return values
    with on(device):
        pinned = values.pin_memory()
        if is_recording(device):
            keep(pinned)
        return pinned.to(device, non_blocking=True)


class Staging:
    """Writes addresses into ``target``, in the order of the current stream and without waiting. The target's device is the current one.

    A ring of pinned buffers, each with an event that says when its copy is done; it grows in the rare case that the host runs so far ahead
    that all are in use. Other buffers are kept for CUDA graphs, which copy from them at every replay: pinning memory while one is recorded
    is not everywhere allowed.
    """

    def __init__(
        self,
        target: Tensor,  # (n,) int64, on any device
        count: int,
    ) -> None:
        self._target = target
        self._count = count
        self._ring: list[tuple[Tensor, torch.cuda.Event]] = []
        self._next = 0
        self._reserve: list[Tensor] = []
        if target.device.type != "cpu" and not is_recording(target.device):
            self._reserve = [self._pinned(target.numel()) for _ in range(_RESERVED)]

    def write(self, offset: int, contents: Contents) -> None:
        """target[offset : offset + count] <- the addresses of a list, (count,)."""
        if self._target.device.type == "cpu":
            contents.write_pointers(self._target.data_ptr() + _ADDRESS * offset)
            return
        buffer, event = self._free_buffer()
        contents.write_pointers(buffer.data_ptr())
        self._target[offset : offset + self._count].copy_(buffer, non_blocking=True)
        event.record()

    def record(self, rows: Mapping[int, Contents]) -> None:
        """The addresses of a list from each offset on, and 0 between them, at this place of the graph that is being recorded."""
        buffer = self._reserve.pop() if self._reserve else self._pinned(self._target.numel())
        buffer.zero_()
        for offset, contents in rows.items():
            contents.write_pointers(buffer.data_ptr() + _ADDRESS * offset)
        self._target.copy_(buffer, non_blocking=True)
        keep(buffer)

    def _free_buffer(self) -> tuple[Tensor, torch.cuda.Event]:
        if self._ring:
            self._next = (self._next + 1) % len(self._ring)
            if self._ring[self._next][1].query():
                return self._ring[self._next]
        self._ring.insert(self._next, (self._pinned(self._count), torch.cuda.Event()))
        return self._ring[self._next]

    def _pinned(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int64, pin_memory=True)
