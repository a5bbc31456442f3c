"""Importance sampling by gradient norms that are learned on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor, distributed

from sam_kernels._validate import check_count, check_number, check_tensor, describe
from sam_kernels.sampling._epochs import Draw, FixedBatchDraws, uniforms, world_size
from sam_kernels.sampling._tree import SumTree

__all__ = ["AdaptiveImportanceSampler"]


class AdaptiveImportanceSampler(FixedBatchDraws):
    r"""Batches of tau draws with replacement, samples of large gradient more often: a batch sampler that learns from :meth:`update`::

        sampler = AdaptiveImportanceSampler(len(dataset), batch_size=32)
        loader = DataLoader(WeightedDataset(dataset), batch_sampler=sampler)
        engine = GradNorms(model)
        for (inputs, labels), indices, weights in loader:
            with engine:
                losses = F.cross_entropy(model(inputs), labels, reduction="none")
            norms = engine(losses)
            sampler.update(indices, norms)
            engine.weighted_grads_(weights / len(weights))  # the gradient of (weights * losses).mean()
            ...

    With e_i the estimated norms, s = ``uniform_share`` and n samples::

        p_i = (1 - s) e_i / Σe + s / n                       weight_i = 1 / (n p_i) ≤ 1 / s
        e_i ← norm at the first update, then decay · e_i + (1 - decay) · norm

    A sample without a norm counts as the mean of those that have one. p_i ∝ ‖∇f_i‖ has the least variance among estimates from single
    draws (Needell, Ward, Srebro, arXiv 1310.5715; Katharopoulos and Fleuret, arXiv 1803.00942).

    An index comes with the weight of the probabilities that it was drawn with (:class:`WeightedIndex`, :class:`WeightedDataset`), so that
    the mean of weight · loss stays unbiased though the probabilities move on, also in batches that a ``DataLoader`` with workers has drawn
    ahead. Those learn of an update later: the draws, unlike those of the other samplers, depend on how many are drawn ahead.

    Draws and updates cost O(tau log n), sums are float64. ``state_dict`` has the estimates, and the batches that were drawn
    beyond its ``position``; memory is 32 to 64 bytes a sample and 16 a draw of an epoch.

    Args:
        data_size: n, the number of samples.
        batch_size: tau, of all replicas together: a multiple of ``num_replicas``.
        num_batches: in an epoch. Default: n // batch_size, at least 1.
        uniform_share: s in (0, 1]; 1 is uniform sampling.
        decay: in [0, 1) of the estimates; 0 takes the last norm.
        seed, num_replicas, rank: as for :class:`ImportanceSampler`; with ``torch.distributed`` initialised as many replicas as processes,
            as all of them exchange what they learn, or 1, for itself.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range.
    """

    def __init__(
        self,
        data_size: int,
        batch_size: int,
        *,
        num_batches: int | None = None,
        uniform_share: float = 0.2,
        decay: float = 0.5,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        name = type(self).__name__
        self.data_size = check_count(name, "data_size", data_size, low=1)
        super().__init__(self.data_size, batch_size, num_batches, seed, num_replicas, rank)
        if self.num_replicas > 1 and world_size() not in (None, self.num_replicas):
            raise ValueError(f"{name}: num_replicas must be 1 or the world size {world_size()}, got {self.num_replicas}")
        self.uniform_share = check_number(name, "uniform_share", uniform_share, low=0.0, high=1.0, open_low=True)
        self.decay = check_number(name, "decay", decay, low=0.0, high=1.0, open_high=True)
        # Of the current epoch: what was drawn, as probabilities do not tell it later. Read from a state's position on.
        self._indices = torch.empty(self._steps, self.batch_size, dtype=torch.int64, device="cpu")
        self._weights = torch.empty(self._steps, self.batch_size, dtype=torch.float64, device="cpu")
        self._drawn = 0
        self._set_estimates(torch.full((self.data_size,), torch.nan, dtype=torch.float64, device="cpu"))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Tensors that come from another process are shared with it: a copy has its own."""
        self.__dict__.update(state)
        self._indices, self._weights = self._indices.clone(), self._weights.clone()

    @property
    def estimates(self) -> Tensor:  # (n,) float64
        """The estimated norms; NaN for samples without one."""
        values, unseen = self._tree.leaves.unbind(1)
        return torch.where(unseen > 0, torch.nan, values)

    @property
    def probabilities(self) -> Tensor:  # (n,) float64
        """Those of the next draw."""
        return self._probability(torch.arange(self.data_size, device="cpu"))

    def update(self, indices: Tensor, norms: Tensor) -> None:  # (m,) int64, (m,)
        """Learns the gradient norms of some samples, such as :class:`sam_kernels.per_sample.GradNorms` gives them. They are the samples'
        own, without the weights of the loss; where one comes several times, the mean of its norms counts as one.

        With ``torch.distributed`` initialised for ``num_replicas`` > 1 processes, every rank has to call it for every one of its batches:
        the ranks exchange what they learn, and draw from the same probabilities.

        Raises:
            TypeError, ValueError: for indices that are no int64 tensor (m,) or out of range, norms that are no floating-point tensor (m,),
                negative, infinite or NaN, or so large that sums of them are. Nothing has changed then, on any rank: all of them raise.
        """
        checked = [self._checked_norms(op, *of_rank) for op, of_rank in self._of_all_replicas(indices, norms)]
        indices, norms = (torch.cat(parts) for parts in zip(*checked, strict=True))
        largest = _largest(max(self.data_size, len(norms)))
        if (norms > largest).any():
            raise ValueError(f"{self._name}.update: norms must be at most {largest:.3g}, got {norms.max().item()}: sums would overflow")
        samples, inverse, counts = torch.unique(indices, return_inverse=True, return_counts=True)
        means = torch.zeros(len(samples), dtype=torch.float64, device="cpu").index_add_(0, inverse, norms) / counts
        old, unseen = self._tree.leaves[samples].unbind(1)
        values = torch.where(unseen > 0, means, self.decay * old + (1 - self.decay) * means)
        self._tree.set_(samples, torch.stack([values, torch.zeros_like(values)], 1))

    def _of_all_replicas(self, indices: Tensor, norms: Tensor) -> list[tuple[str, tuple[Tensor, Tensor]]]:
        """What the ranks were given, unchecked, with the name of the operation: a rank that raised before would let the others wait."""
        indices, norms = (x.detach().cpu() if isinstance(x, Tensor) else x for x in (indices, norms))
        op, own = f"{self._name}.update", (indices, norms)
        if self.num_replicas == 1 or world_size() is None:
            return [(op, own)]
        everything: list[Any] = [None] * self.num_replicas
        distributed.all_gather_object(everything, own)
        return [(f"{op} of rank {rank}", of_rank) for rank, of_rank in enumerate(everything)]

    def _checked_norms(self, op: str, indices: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(indices, Tensor) or indices.dtype is not torch.int64 or indices.dim() != 1:
            raise TypeError(f"{op}: indices must be an int64 tensor of one dimension, got {describe(indices)}")
        if check_tensor(op, "norms", norms).shape != indices.shape:
            raise ValueError(f"{op}: norms must have the shape of indices {tuple(indices.shape)}, got {describe(norms)}")
        norms = norms.to(torch.float64)
        outside = (indices < 0) | (indices >= self.data_size)
        if outside.any():
            raise ValueError(f"{op}: indices must be in [0, {self.data_size}), got {indices[outside][0].item()}")
        wrong = ~norms.isfinite() | (norms < 0)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise ValueError(f"{op}: norms must be finite and at least 0, got norms[{i}] = {norms[i].item()}")
        return indices, norms

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        state = super().state_dict(position)
        ahead = slice(state["position"], self._drawn)
        return state | {"estimates": self.estimates, "indices": self._indices[ahead].clone(), "weights": self._weights[ahead].clone()}

    state_dict.__doc__ = FixedBatchDraws.state_dict.__doc__

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        _, _, position = self._checked(state_dict)
        estimates, indices, weights = self._checked_tensors(state_dict, position)
        super().load_state_dict(state_dict)
        self._drawn = self._position + len(indices)
        self._indices[self._position : self._drawn] = indices
        self._weights[self._position : self._drawn] = weights
        self._set_estimates(estimates)

    load_state_dict.__doc__ = FixedBatchDraws.load_state_dict.__doc__

    def _checked_tensors(self, state_dict: dict[str, Any], position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Estimates, indices and weights of a state, as they are stored here."""
        name, (estimates, indices, weights) = self._name, (state_dict[key] for key in ("estimates", "indices", "weights"))
        for key, tensor in (("estimates", estimates), ("weights", weights)):
            check_tensor(name, f"state_dict['{key}']", tensor)
        if not isinstance(indices, Tensor) or indices.dtype is not torch.int64:
            raise TypeError(f"{name}: state_dict['indices'] must be an int64 tensor, got {describe(indices)}")
        if estimates.shape != (self.data_size,):
            raise ValueError(f"{name}: state_dict['estimates'] must have the shape ({self.data_size},), got {tuple(estimates.shape)}")
        left = self._steps - position
        if indices.dim() != 2 or len(indices) > left or indices.shape[1] != self.batch_size or weights.shape != indices.shape:
            raise ValueError(
                f"{name}: state_dict['indices'] and ['weights'] must both have a shape (at most {left}, {self.batch_size}), "
                f"got {tuple(indices.shape)} and {tuple(weights.shape)}"
            )
        estimates, weights = (tensor.detach().to("cpu", torch.float64) for tensor in (estimates, weights))
        indices = indices.cpu()
        if ((indices < 0) | (indices >= self.data_size)).any():
            raise ValueError(f"{name}: state_dict['indices'] must be in [0, {self.data_size})")
        if (~weights.isfinite() | (weights <= 0)).any():
            raise ValueError(f"{name}: state_dict['weights'] must be finite and more than 0")
        if ((estimates < 0) | (estimates > _largest(self.data_size))).any():  # NaN is a sample without one
            raise ValueError(f"{name}: state_dict['estimates'] must be NaN or in [0, {_largest(self.data_size):.3g}]")
        return estimates, indices, weights

    def _go_to(self, epoch: int) -> None:
        super()._go_to(epoch)
        self._drawn = 0

    def _set_estimates(self, estimates: Tensor) -> None:  # (n,)
        """The tree's two numbers of a sample: its estimate, and 1 where there is none."""
        self._tree = SumTree(self.data_size, 2)
        self._tree.set_(torch.arange(self.data_size, device="cpu"), torch.stack([estimates.nan_to_num(), estimates.isnan().double()], 1))

    def _factors(self) -> Tensor:  # (2,)
        """A sample's e_i is the product of its two numbers with these: 1, and the mean of the estimates that there are."""
        total, unseen = self._tree.total.tolist()
        return torch.tensor([1.0, total / (self.data_size - unseen) if unseen < self.data_size else 0.0], dtype=torch.float64, device="cpu")

    def _probability(self, indices: Tensor) -> Tensor:  # (m,) -> (m,)
        factors = self._factors()
        total = self._tree.total @ factors
        if total == 0:
            return torch.full(indices.shape, 1 / self.data_size, dtype=torch.float64, device="cpu")
        return (1 - self.uniform_share) * (self._tree.leaves[indices] @ factors / total) + self.uniform_share / self.data_size

    def _draws(self, generator: Generator, start: int) -> Iterator[Draw]:
        for step in range(self._steps):
            numbers = uniforms(self.batch_size, 2, generator=generator)
            if step < start:
                continue
            if step >= self._drawn:  # else a loaded state had it drawn, from the probabilities of that time
                self._indices[step] = self._choose(numbers)
                self._weights[step] = 1 / (self.data_size * self._probability(self._indices[step]))
                self._drawn = step + 1
            yield self._indices[step].tolist(), self._weights[step].tolist()

    def _choose(self, numbers: Tensor) -> Tensor:  # (m, 2) -> (m,) int64
        """One random number decides between uniform and learned probabilities, the other one which sample it is."""
        factors = self._factors()
        total = self._tree.total @ factors
        uniform = (numbers[:, 1] * self.data_size).long()
        if total == 0:
            return uniform
        return torch.where(numbers[:, 0] < self.uniform_share, uniform, self._tree.find(numbers[:, 1] * total, factors))


def _largest(count: int) -> float:
    """The largest number of which sums of as many stay finite, with those of the samples that count as the mean."""
    return torch.finfo(torch.float64).max / (2 * count)
