"""What all samplers share: epochs, the parts of replicas, and states to go on from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Generator, distributed
from torch.utils.data import Sampler

from sam_kernels._validate import check_count, check_seed, describe
from sam_kernels.sampling._weighted import WeightedIndex

__all__ = ["BatchDraws", "Draw", "Draws"]

T_co = TypeVar("T_co", covariant=True)
Draw = tuple[list[int], list[float]]  # what all replicas draw together in a step: indices, and the weights of their losses


class Draws(Sampler[T_co]):
    """A sampler whose draws follow from (seed, epoch). Subclasses say how many an epoch has, what they are, and whose part is what."""

    _steps: int  # draws in an epoch

    def __init__(self, seed: int, num_replicas: int | None, rank: int | None) -> None:
        self._name = name = type(self).__name__
        initialized = distributed.is_available() and distributed.is_initialized()
        if num_replicas is None:
            num_replicas = distributed.get_world_size() if initialized else 1
        if rank is None:
            rank = distributed.get_rank() if initialized else 0
        self.num_replicas = check_count(name, "num_replicas", num_replicas, low=1)
        self.rank = check_count(name, "rank", rank, low=0, high=num_replicas - 1)
        self.seed = check_seed(name, "seed", seed)
        self.epoch = 0
        self._position = 0  # in steps, of this epoch
        self._begun = False  # whether an iterator is past _position: the next one begins another epoch

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[T_co]:
        # A generator: a DataLoader with workers asks for two iterators when it starts, and begins with one of them.
        if self._begun:
            self._go_to(self.epoch + 1)
        self._begun = True
        start, generator = self._position, torch.Generator().manual_seed(_seed_of(self.seed, self.epoch))
        for position, draw in enumerate(islice(self._draws(generator, start), self._steps - start), start + 1):
            self._position = position
            yield self._part(draw)

    def _draws(self, generator: Generator, start: int) -> Iterator[Draw]:
        """The draws of an epoch from step ``start`` on, without end."""
        return islice(self._all_draws(generator), start, None)

    def _all_draws(self, generator: Generator) -> Iterator[Draw]:
        raise NotImplementedError

    def _part(self, draw: Draw) -> T_co:
        """What this rank makes of a draw of all replicas."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that of this epoch. Without it every iteration is the epoch after the one before.

        The epoch of a state just loaded goes on where it was left; any other begins at its beginning.
        """
        check_count(self._name, "epoch", epoch, low=0)
        if self._begun or epoch != self.epoch:
            self._go_to(epoch)
        self._begun = False

    def _go_to(self, epoch: int) -> None:
        """The beginning of an epoch."""
        self.epoch, self._position = epoch, 0

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """Where the current epoch is: a sampler of the same arguments that loads it goes on with exactly the draws that are left.

        Args:
            position: how many of this epoch's batches (single draws: indices) have been used. Needed with a ``DataLoader`` that has
                workers, as it draws ahead. None: all that were drawn.

        Raises:
            TypeError, ValueError: for a position that is no integer, or beyond what was drawn.
        """
        position = self._position if position is None else check_count(self._name, "position", position, low=0, high=self._position)
        return {"seed": self.seed, "epoch": self.epoch, "position": position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next iteration goes on where ``state_dict`` was made: after the last draw of an epoch, with the epoch after it.

        Raises:
            TypeError, ValueError: for a state that is none of this class, or of other sizes.
        """
        seed, epoch, position = self._checked(state_dict)
        self.seed, self._begun = seed, False
        self.epoch, self._position = (epoch, position) if position < self._steps else (epoch + 1, 0)

    def _checked(self, state_dict: dict[str, Any]) -> tuple[int, int, int]:
        """Seed, epoch and position of a state that fits."""
        if not isinstance(state_dict, dict):
            raise TypeError(f"{self._name}: state_dict must be a dict, got {describe(state_dict)}")
        if set(state_dict) != set(self.state_dict()):
            raise ValueError(f"{self._name}: state_dict must have the keys {sorted(self.state_dict())}, got {sorted(state_dict)}")
        seed = check_seed(self._name, "seed", state_dict["seed"])
        epoch = check_count(self._name, "epoch", state_dict["epoch"], low=0)
        return seed, epoch, check_count(self._name, "position", state_dict["position"], low=0, high=self._steps)


class BatchDraws(Draws[list[int]]):
    """Draws that are batches: rank r takes the elements r, r + num_replicas, … of each."""

    def _mine(self, draw: Draw) -> Draw:
        mine = slice(self.rank, None, self.num_replicas)
        return draw[0][mine], draw[1][mine]

    def _part(self, draw: Draw) -> list[int]:
        return [WeightedIndex(index, weight) for index, weight in zip(*self._mine(draw), strict=True)]

    def _check_batch_size(self, batch_size: int, high: int | None = None) -> int:
        name = type(self).__name__
        check_count(name, "batch_size", batch_size, low=1, high=high)
        if batch_size % self.num_replicas:
            raise ValueError(f"{name}: batch_size must be a multiple of num_replicas {self.num_replicas}, got {batch_size}")
        return batch_size


def _seed_of(seed: int, epoch: int) -> int:
    """Another stream for every pair: with seed + epoch, epoch 1 of seed 0 would be epoch 0 of seed 1."""
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
