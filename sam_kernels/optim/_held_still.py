"""What the second pass must not change or must see again: module buffers and random numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["BufferGuard", "RandomState"]


class BufferGuard:
    """Puts module buffers back to what they were after the first pass.

    For one module these are the running statistics of its normalisation layers; for a list of modules, every buffer of each module named.
    """

    def __init__(self, model: nn.Module | Iterable[nn.Module] | None) -> None:
        self.model: nn.Module | list[nn.Module] | None
        if model is None or isinstance(model, nn.Module):
            self.model = model
        else:
            self.model = list(model)
            for i, module in enumerate(self.model):
                if not isinstance(module, nn.Module):
                    raise TypeError(f"SAM: model[{i}] must be a torch.nn.Module, got {type(module).__name__}")
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._is_current = False  # whether they are this step's

    def _buffers(self) -> list[Tensor]:
        if self.model is None:
            return []
        if isinstance(self.model, nn.Module):  # found anew each time: layers may have been replaced
            layers = [module for module in self.model.modules() if isinstance(module, _NormBase)]
            return [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
        return [buffer for module in self.model for buffer in module.buffers()]

    @torch.no_grad()
    def save(self) -> None:
        """Remembers the buffers, reusing last step's copies."""
        buffers = self._buffers()
        kept = {id(buffer): copy for buffer, copy in self._saved}
        saved = []
        for buffer in buffers:
            copy = kept.get(id(buffer))
            if copy is None or copy.shape != buffer.shape or copy.dtype != buffer.dtype or copy.device != buffer.device:
                copy = torch.empty_like(buffer)
            saved.append((buffer, copy))
        if saved:
            torch._foreach_copy_([copy for _, copy in saved], [buffer for buffer, _ in saved])
        self._saved = saved
        self._is_current = True

    @torch.no_grad()
    def restore(self) -> None:
        """Puts them back, where they were saved in this step."""
        if self._saved and self._is_current:
            torch._foreach_copy_([buffer for buffer, _ in self._saved], [copy for _, copy in self._saved])

    def begin(self) -> None:
        """A new step: what was saved is an older one's, and buffers may have been changed since."""
        self._is_current = False

    def release(self) -> None:
        """Frees the copies."""
        self._saved = []


class RandomState:
    """The random generators of the CPU and of the devices in use, so that both passes draw the same dropout masks."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = [(device, torch.cuda.get_rng_state(device)) for device in devices if device.type == "cuda"]

    def replay(self) -> None:
        """Sets the generators to where they were when this was made."""
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            torch.cuda.set_rng_state(state, device)
