"""Numbers on their way from a device to the host, which does not wait for them before it needs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Reading"]


class Reading:
    """What a tensor holds now. Nothing waits before :meth:`value` is called, and the tensor may be written at once."""

    def __init__(self, numbers: Tensor) -> None:
        self._event: Any = None
        if numbers.is_cpu:
            self._host: Any = numbers.tolist()
            return
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
        self._host.copy_(numbers, non_blocking=True)
        module = torch.get_device_module(numbers.device)
        self._event = module.Event()
        self._event.record(module.current_stream(numbers.device))  # another device may be the current one

    def value(self) -> Any:
        """A number for a () tensor, otherwise a list. Waits for what was queued before the tensor was read, and for nothing after it."""
        if self._event is None:
            return self._host
        self._event.synchronize()
        return self._host.tolist()
