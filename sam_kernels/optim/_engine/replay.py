"""What the second pass must not change or must see again: module buffers and random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

__all__ = ["BufferGuard", "RandomState"]


class BufferGuard:
    """Puts module buffers back to what they were after the first pass.

    For one module these are the running statistics of its normalisation layers and the vectors of spectral normalisation, which every
    forward pass in training mode moves on; for a list of modules, every buffer of each module named.
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
        assert self.model is not None
        if isinstance(self.model, nn.Module):  # found anew each time: layers may have been replaced
            return [buffer for module in self.model.modules() for buffer in _statistics(module)]
        return [buffer for module in self.model for buffer in module.buffers()]

    def save(self) -> None:
        """Remembers the buffers, reusing last step's copies."""
        if self.model is not None:
            self._copy(self._buffers())

    @torch.no_grad()
    def _copy(self, buffers: list[Tensor]) -> None:
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

    def restore(self) -> None:
        """Puts them back, where they were saved in this step."""
        if self._saved and self._is_current:
            with torch.no_grad():
                torch._foreach_copy_([buffer for buffer, _ in self._saved], [copy for _, copy in self._saved])

    def begin(self) -> None:
        """A new step: what was saved is an older one's, and buffers may have been changed since."""
        self._is_current = False

    def release(self) -> None:
        """Frees the copies."""
        self._saved = []


def _statistics(module: nn.Module) -> list[Tensor]:
    if isinstance(module, _NormBase | _SpectralNorm):
        return list(module.buffers(recurse=False))
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
    return [getattr(module, f"{hook.name}{end}") for hook in hooks for end in ("_u", "_v")]


class RandomState:
    """The random generators of the CPU and of the devices in use, so that both passes draw the same dropout masks.

    Made before the first forward pass; :meth:`replay` before the second; :meth:`settle` after it.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = [device for device in devices if device.type not in ("cpu", "meta")]
        self._start = self._now()
        self._first_end: list[Tensor] | None = None

    def _now(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.get_device_module(device).get_rng_state(device) for device in self._devices)]

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)

    def replay(self) -> None:
        """Sets the generators to where they were when this was made, and remembers how far the first pass has taken them."""
        self._first_end = self._now()
        self._set(self._start)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Around the second pass, whatever becomes of it."""
        self.replay()
        try:
            yield
        finally:
            self.settle()

    def settle(self) -> None:
        """Sets each generator to the further of the two ends, so that the next step draws no number again."""
        if self._first_end is None:
            return
        ends = self._now()
        first, self._first_end = self._first_end, None
        further = [_further(*each) for each in zip(self._start, first, ends, strict=True)]
        if any(each is not end for each, end in zip(further, ends, strict=True)):
            self._set(further)


def _further(start: Tensor, first: Tensor, second: Tensor) -> Tensor:  # (bytes,) uint8, states of one generator
    """The state that is reached from ``start`` after more draws; ``second`` where that cannot be told (somebody has set a seed)."""
    if torch.equal(first, second):
        return second
    if len(start) == 16:  # Philox, on devices: seed and offset, 8 bytes each
        seeds_and_offsets = [state.view(torch.int64).tolist() for state in (start, first, second)]
        (seed, _), (seed_1, offset_1), (seed_2, offset_2) = seeds_and_offsets
        return first if seed == seed_1 == seed_2 and offset_1 > offset_2 else second
    if len(start) < _WORDS.stop:
        return second
    blocks = [state[_WORDS] for state in (first, second)]
    if torch.equal(*blocks):  # in one block of 624 words: the index of the next one
        nexts = [int(state[_NEXT].clone().view(torch.int64)) for state in (first, second)]
        return first if nexts[0] > nexts[1] else second
    generator = torch.Generator("cpu")
    generator.set_state(start)
    for _ in range(_BLOCKS_LOOKED_AT):
        block = generator.get_state()[_WORDS]
        if torch.equal(block, blocks[1]):
            return first
        if torch.equal(block, blocks[0]):
            return second
        torch.empty(_BLOCK, dtype=torch.int32, device="cpu").random_(generator=generator)
    return second


# The CPU's generator as torch saves it: seed, words left, flag, next word (8 bytes), 624 words of 8 bytes, cached normals.
_BLOCK = 624  # of the Mersenne Twister
_NEXT = slice(16, 24)
_WORDS = slice(24, 24 + 8 * _BLOCK)
_BLOCKS_LOOKED_AT = 1 << 14  # 10 million draws, 0.1 s: only where two passes have drawn differently often
