"""Draws with replacement, with probabilities that stay: single ones, and batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from sam_kernels._validate import check_count, check_probabilities, check_vector
from sam_kernels.sampling._epochs import Draw, Draws, FixedBatchDraws, uniforms
from sam_kernels.sampling._weighted import WeightedIndex, weights_of

__all__ = ["ImportanceBatchSampler", "ImportanceSampler"]

_BLOCK = 1024  # draws made at a time: one by one, each would pay for a call of every operation


class _Table:
    """Probabilities, and draws from them by inversion of their cumulative sums."""

    def __init__(self, name: str, probabilities: Tensor | Sequence[float] | None, lipschitz: Tensor | Sequence[float] | None) -> None:
        if (probabilities is None) == (lipschitz is None):
            raise ValueError(f"{name}: give either probabilities or lipschitz")
        if lipschitz is not None:
            p = check_vector(name, "lipschitz", lipschitz, low=0.0, open_low=True)
            p /= p.max()  # else the sum of large ones may be infinite
        else:
            p = check_probabilities(name, "probabilities", probabilities)
        self.probabilities = p / p.sum()  # (n,)
        self.weights = weights_of(name, "probabilities" if lipschitz is None else "lipschitz", self.probabilities)  # (n,)
        self._cumulative = self.probabilities.cumsum(0)
        self._cumulative /= self._cumulative[-1].clone()  # the last is 1, more than any random number

    def find(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers in [0, 1) to indices and weights of the same shape."""
        indices = torch.searchsorted(self._cumulative, uniforms, right=True)
        return indices, self.weights[indices]


class ImportanceSampler(Draws[int]):
    """Single elements, drawn independently with replacement: i with probability p_i, its loss weighted by 1 / (n p_i).

    In a ``DataLoader`` with ``batch_size=tau`` it makes batches of tau draws (the last one of an epoch may be shorter: no less unbiased).
    What comes is a :class:`WeightedIndex`: an ``int`` that carries the weight. Single-element and importance sampling of arXiv 2503.02225,
    section 3; the weight is what makes E[weight ∇f_i] = ∇f.

    Args:
        probabilities: (n,) p_i > 0, a floating-point tensor or a sequence, of sum 1 within n times the eps of its dtype.
        lipschitz: (n,) L_i > 0 instead, the smoothness of the samples' losses: importance sampling, p_i = L_i / ΣL.
        num_samples: draws in an epoch, of all replicas together. Default: n. Every rank gets as many, rounded up.
        seed: of the draws, with the epoch; the same on every rank.
        num_replicas, rank: who takes which draws. Default: those of ``torch.distributed`` where it is initialised, else 1 and 0; without it
            more than one replica need their ranks.

    Attributes:
        probabilities: (n,) float64.
        weights: (n,) float64, 1 / (n p_i).

    Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range.
    """

    def __init__(
        self,
        probabilities: Tensor | Sequence[float] | None = None,  # (n,)
        *,
        lipschitz: Tensor | Sequence[float] | None = None,  # (n,)
        num_samples: int | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        name = type(self).__name__
        self._table = _Table(name, probabilities, lipschitz)
        self.probabilities, self.weights = self._table.probabilities, self._table.weights
        self.num_samples = len(self.weights) if num_samples is None else check_count(name, "num_samples", num_samples, low=1)
        super().__init__(seed, num_replicas, rank)
        self._steps = -(-self.num_samples // self.num_replicas)
        self._sizes = {"data_size": len(self.weights), "num_replicas": self.num_replicas}  # as many are drawn together

    def draw(self, num_draws: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:  # (num_draws,) int64, float64
        """Indices and weights as tensors, for loops without a ``DataLoader``; no part of the epoch. Random numbers: ``generator``, or
        torch's own."""
        num_draws = check_count(self._name, "num_draws", num_draws, low=0)
        return self._table.find(uniforms(num_draws, generator=generator))

    def _all_draws(self, generator: Generator) -> Iterator[Draw]:
        while True:
            block = self._table.find(uniforms(_BLOCK, self.num_replicas, generator=generator))
            yield from zip(*(part.tolist() for part in block), strict=True)

    def _part(self, draw: Draw) -> int:
        return WeightedIndex(draw[0][self.rank], draw[1][self.rank])


class ImportanceBatchSampler(FixedBatchDraws):
    """Batches of tau independent draws with replacement: the mean of weight · loss over a batch is unbiased, weights 1 / (n p_i).

    A sample drawn twice is in the batch twice. Sampling with replacement of arXiv 2503.02225, section 3.

    Args:
        probabilities, lipschitz, seed, num_replicas, rank: as for :class:`ImportanceSampler`.
        batch_size: tau, of all replicas together: a multiple of ``num_replicas``.
        num_batches: in an epoch. Default: n // batch_size, at least 1.

    Attributes, errors: as there.
    """

    def __init__(
        self,
        probabilities: Tensor | Sequence[float] | None = None,  # (n,)
        *,
        lipschitz: Tensor | Sequence[float] | None = None,  # (n,)
        batch_size: int,
        num_batches: int | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        self._table = _Table(type(self).__name__, probabilities, lipschitz)
        self.probabilities, self.weights = self._table.probabilities, self._table.weights
        super().__init__(len(self.weights), batch_size, num_batches, seed, num_replicas, rank)

    def _all_draws(self, generator: Generator) -> Iterator[Draw]:
        while True:
            indices, weights = self._table.find(uniforms(self.batch_size, generator=generator))
            yield indices.tolist(), weights.tolist()
