"""Batches that are random subsets: of a fixed size, or every sample by a coin of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from sam_kernels._validate import check_count, check_vector
from sam_kernels.sampling._epochs import BatchDraws, Draw, FixedBatchDraws, uniforms
from sam_kernels.sampling._weighted import WeightedIndex, weights_of

__all__ = ["IndependentBatchSampler", "TauNiceBatchSampler"]


class TauNiceBatchSampler(FixedBatchDraws):
    """tau-nice sampling: each batch is a uniformly random subset of tau samples, without replacement, independent of the batches before.

    Not an epoch's permutation: a sample may be in two batches running, and in none of an epoch. Every weight is 1. A batch comes in
    uniformly random order, so that its micro-batches are random too, and costs O(tau) whatever n is. arXiv 2503.02225, section 3.

    Args:
        data_size: n, the number of samples.
        batch_size: tau ≤ n, of all replicas together: a multiple of ``num_replicas``.
        num_batches: in an epoch. Default: n // batch_size.
        seed, num_replicas, rank: as for :class:`ImportanceSampler`.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range.
    """

    def __init__(
        self,
        data_size: int,
        batch_size: int,
        *,
        num_batches: int | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        self.data_size = check_count(type(self).__name__, "data_size", data_size, low=1)
        super().__init__(self.data_size, batch_size, num_batches, seed, num_replicas, rank, largest_batch=self.data_size)
        self._left = self.data_size - torch.arange(self.batch_size, device="cpu")  # samples to choose from, at each of the tau choices

    def _all_draws(self, generator: Generator) -> Iterator[Draw]:
        weights = [1.0] * self.batch_size
        while True:
            # The remainder of 62 random bits favours small numbers by n / 2^62 at most.
            steps = torch.randint(1 << 62, (self.batch_size,), generator=generator) % self._left
            yield _subset(steps.tolist()), weights


def _subset(steps: Sequence[int]) -> list[int]:
    """A partial shuffle of 0, 1, … in which place i changes with place i + steps[i]: the tau places at the front.

    Every ordered choice of tau out of n comes from exactly one ``steps``, steps[i] < n - i. Only places that have changed are stored.
    """
    moved: dict[int, int] = {}
    chosen = []
    for i, step in enumerate(steps):
        chosen.append(moved.get(i + step, i + step))
        moved[i + step] = moved.get(i, i)
    return chosen


class IndependentBatchSampler(BatchDraws):
    """Independent sampling: sample i is in a batch with its own probability p_i, whatever else is. Batches have random sizes.

    The sum over a batch of ∇f_i / (n p_i) is unbiased (arXiv 2503.02225, section 3). So that here too the *mean* of weight · loss is what
    to minimise, the weight that comes with an index is that times the size of the batch: |S| / (n p_i).

    An empty batch is an estimate of 0, and has to stay one: to draw again would divide every expectation by the probability of a batch that
    is not empty. As a ``DataLoader`` cannot make a batch of nothing, one sample comes with weight 0, that which came nearest to being
    drawn. With replicas each takes its part of S with weights |part| · num_replicas / (n p_i), the mean of whose gradients, as
    ``DistributedDataParallel`` makes it, is that of S; an empty part likewise is one sample of weight 0.

    Args:
        probabilities: (n,) 0 < p_i ≤ 1, a floating-point tensor or a sequence; their sum is the expected size of a batch.
        num_batches: in an epoch. Default: n over that sum, at least 1.
        seed, num_replicas, rank: as for :class:`ImportanceSampler`.

    Attributes:
        probabilities: (n,) float64.
        weights: (n,) float64, 1 / (n p_i), for sums.

    A draw costs O(n). Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range.
    """

    def __init__(
        self,
        probabilities: Tensor | Sequence[float],  # (n,)
        *,
        num_batches: int | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        name = type(self).__name__
        self.probabilities = check_vector(name, "probabilities", probabilities, low=0.0, open_low=True)
        if (self.probabilities > 1).any():
            raise ValueError(f"{name}: probabilities must be at most 1, got {self.probabilities.max().item()!r}")
        self.weights = weights_of(name, "probabilities", self.probabilities)
        default = max(1, round(len(self.probabilities) / self.probabilities.sum().item()))
        self._steps = self._batches(num_batches, default)
        self._sizes = {"data_size": len(self.weights)}
        super().__init__(seed, num_replicas, rank)

    def _all_draws(self, generator: Generator) -> Iterator[Draw]:
        while True:
            # What is below 1 is drawn: a probability of 1 always, as the random number is less than 1.
            yield self._draw(uniforms(len(self.weights), generator=generator) / self.probabilities)

    def _draw(self, tried: Tensor) -> Draw:  # (n,)
        drawn = (tried < 1).nonzero().flatten()
        if len(drawn):
            return drawn.tolist(), self.weights[drawn].tolist()
        return [int(tried.argmin())], [0.0]

    def _part(self, draw: Draw) -> list[int]:
        indices, weights = self._mine(draw)
        if not indices:
            return [WeightedIndex(draw[0][0], 0.0)]
        factor = len(indices) * self.num_replicas
        return [WeightedIndex(index, factor * weight) for index, weight in zip(indices, weights, strict=True)]
