"""What all samplers share: epochs, the parts of replicas, and states to go on from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, distributed
from torch.utils.data import Sampler

from sam_kernels._validate import check_count, check_seed, describe
from sam_kernels.sampling._weighted import WeightedIndex

__all__ = ["BatchDraws", "Draw", "Draws", "FixedBatchDraws", "uniforms", "world_size"]

T_co = TypeVar("T_co", covariant=True)
Draw = tuple[list[int], list[float]]  # what all replicas draw together in a step: indices, and the weights of their losses


class Draws(Sampler[T_co]):
    """A sampler whose draws follow from (seed, epoch). Subclasses say how many an epoch has, what they are, and whose part is what."""

    _steps: int  # draws in an epoch
    _sizes: dict[str, int]  # by name, what else a state has in common with a sampler that can go on from it

    def __init__(self, seed: int, num_replicas: int | None, rank: int | None) -> None:
        self._name = name = type(self).__name__
        world = world_size()
        if num_replicas is None:
            num_replicas = world or 1
        self.num_replicas = check_count(name, "num_replicas", num_replicas, low=1)
        if rank is None:
            if self.num_replicas > 1 and world is None:
                raise ValueError(f"{name}: num_replicas {self.num_replicas} needs rank, as torch.distributed is not initialised")
            rank = distributed.get_rank() if self.num_replicas > 1 else 0
        self.rank = check_count(name, "rank", rank, low=0, high=self.num_replicas - 1)
        self.seed = check_seed(name, "seed", seed)
        self.epoch = 0
        self._position = self._start = 0  # in steps, of this epoch; where it was begun, more than 0 after a state was loaded
        self._begun = False  # whether an iterator is past _position: the next one begins another epoch
        self._turn = 0  # an iterator of another turn than this one is over: position and draws are no longer its own

    def __len__(self) -> int:
        return self._steps

    def __repr__(self) -> str:
        values = {**self._own(), "seed": self.seed, "epoch": self.epoch, "position": self._position}
        return f"{values.pop('sampler')}({', '.join(f'{name}={value}' for name, value in values.items())})"

    def __iter__(self) -> Iterator[T_co]:
        # A generator: a DataLoader with workers asks for two iterators when it starts, and begins with one of them.
        if self._begun:
            self._go_to(self.epoch + 1)
        self._begun = True
        self._turn += 1
        turn, start, generator = self._turn, self._position, torch.Generator().manual_seed(_seed_of(self.seed, self.epoch))
        draws = self._draws(generator, start)
        for position in range(start, self._steps):
            if turn != self._turn:
                raise RuntimeError(f"{self._name} was iterated anew, or its epoch or state was set: an iterator of before cannot go on")
            draw = next(draws)
            self._position = position + 1
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
        epoch = check_count(self._name, "epoch", epoch, low=0)
        if self._begun or epoch != self.epoch:
            self._go_to(epoch)
        self._begun = False
        self._turn += 1

    def _go_to(self, epoch: int) -> None:
        """The beginning of an epoch."""
        self.epoch, self._position, self._start = epoch, 0, 0

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """Where the current epoch is: a sampler of the same arguments that loads it goes on with exactly the draws that are left.

        Args:
            position: how many of this epoch's batches (single draws: indices) have been used, counted from the epoch's beginning also
                where a state was loaded in its middle. Needed with a ``DataLoader`` that has workers, as it draws ahead. None: all that
                were drawn.

        Raises:
            TypeError, ValueError: for a position that is no integer, beyond what was drawn, or before that of the state that was loaded.
        """
        if position is None:
            position = self._position
        position = check_count(self._name, "position", position, low=self._start, high=self._position)
        return {**self._own(), "seed": self.seed, "epoch": self.epoch, "position": position}

    def _own(self) -> dict[str, Any]:
        """What a state says of the sampler that it is of."""
        return {"sampler": self._name, "steps": self._steps, **self._sizes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next iteration goes on where ``state_dict`` was made: after the last draw of an epoch, with the epoch after it.

        Raises:
            TypeError, ValueError: for a state that is none of this class, or of other sizes. Nothing has changed then.
        """
        self.seed, epoch, position = self._checked(state_dict)
        self._begun = False
        self._turn += 1
        self.epoch, self._position = (epoch, position) if position < self._steps else (epoch + 1, 0)
        self._start = self._position

    def _checked(self, state_dict: dict[str, Any]) -> tuple[int, int, int]:
        """Seed, epoch and position of a state that fits."""
        if not isinstance(state_dict, dict):
            raise TypeError(f"{self._name}: state_dict must be a dict, got {describe(state_dict)}")
        own, keys = self._own(), sorted(self.state_dict())
        for key in own:
            if key in state_dict and state_dict[key] != own[key]:
                raise ValueError(f"{self._name}: state_dict is of {key} {state_dict[key]!r}, this sampler's is {own[key]!r}")
        if set(state_dict) != set(keys):
            raise ValueError(f"{self._name}: state_dict must have the keys {keys}, got {sorted(map(str, state_dict))}")
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

    def _batches(self, num_batches: int | None, default: int) -> int:
        """In an epoch."""
        return default if num_batches is None else check_count(type(self).__name__, "num_batches", num_batches, low=1)


class FixedBatchDraws(BatchDraws):
    """Batches of one size: a multiple of the number of replicas. The default epoch has n // batch_size of them, at least 1."""

    def __init__(
        self,
        data_size: int,
        batch_size: int,
        num_batches: int | None,
        seed: int,
        num_replicas: int | None,
        rank: int | None,
        *,
        largest_batch: int | None = None,
    ) -> None:
        super().__init__(seed, num_replicas, rank)
        self.batch_size = check_count(self._name, "batch_size", batch_size, low=1, high=largest_batch)
        if batch_size % self.num_replicas:
            raise ValueError(f"{self._name}: batch_size must be a multiple of num_replicas {self.num_replicas}, got {batch_size}")
        self._steps = self._batches(num_batches, max(1, data_size // self.batch_size))
        self._sizes = {"data_size": data_size, "batch_size": self.batch_size}


def world_size() -> int | None:
    """That of ``torch.distributed``, where it is initialised."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else None


def _seed_of(seed: int, epoch: int) -> int:
    """Another stream for every pair, as far as 32 bits tell them apart, of which alone torch's generator on the CPU takes its seed: two
    pairs share one by chance of 2^-32. With seed + epoch, epoch 1 of seed 0 would be epoch 0 of seed 1."""
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniforms(*shape: int, generator: Generator | None) -> Tensor:  # (*shape)
    """Return random numbers in [0, 1), float64. Samplers draw on the CPU, whatever the default device is."""
    return torch.rand(*shape, generator=generator, dtype=torch.float64, device="cpu")
