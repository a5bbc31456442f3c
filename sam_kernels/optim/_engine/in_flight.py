"""A perturbation that was asked for and not yet heard of, and what an exception in the midst of it has left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sam_kernels.optim._engine.lists import GroupLists, same_bits

__all__ = ["InFlight"]


@dataclass
class InFlight:
    """A group under perturbation: Ctrl-C may come before it, after it, or between two launches."""

    lists: GroupLists
    perturb_: Callable[..., None]

    def saved_rows(self) -> list[int]:
        """The rows whose backup is this step's: they lie where the backup is, or exactly where a perturbation from it leads.

        Every perturbation has the same bits, so this asks what would otherwise have to be noted at every step. Waits for the device.
        """
        params, old_params = self.lists.params, self.lists.old_params
        moved = [torch.empty_like(param) for param in params]
        self.perturb_(moved, old_params=old_params, from_old=True)
        return [
            i
            for i, (param, old, there) in enumerate(zip(params, old_params, moved, strict=True))
            if same_bits(param, old) or same_bits(param, there)
        ]
