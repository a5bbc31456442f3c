"""How a weight travels from the sampler to the loss: with its index, so that no prefetching or order of workers can part them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from sam_kernels._validate import describe

__all__ = ["WeightedDataset", "WeightedIndex", "weights_of"]


class WeightedIndex(int):
    """The index of a sample, an ``int`` for every dataset, with the weight of its loss at the time it was drawn."""

    weight: float

    def __new__(cls, index: int, weight: float) -> WeightedIndex:
        self = super().__new__(cls, index)
        self.weight = weight
        return self

    def __reduce__(self) -> tuple[type[WeightedIndex], tuple[int, float]]:  # indices are pickled for the workers
        return type(self), (int(self), self.weight)

    def __repr__(self) -> str:
        return f"WeightedIndex({int(self)}, weight={self.weight!r})"


class WeightedDataset(Dataset[tuple[Any, int, float]]):
    """``dataset`` with every sample's index and weight: ``(sample, index, weight)``, for the samplers of this package::

        loader = DataLoader(WeightedDataset(dataset), batch_sampler=TauNiceBatchSampler(len(dataset), 32))
        for (inputs, labels), indices, weights in loader:  # weights: (B,) float64
            loss = (weights * F.cross_entropy(model(inputs), labels, reduction="none")).mean()

    It is the outermost dataset: one that computes another index (``Subset``) around it would lose the weight.

    Raises TypeError for an index without a weight: one of another sampler.
    """

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__getitem__"):
            raise TypeError(f"WeightedDataset: dataset must have __getitem__, got {describe(dataset)}")
        if isinstance(dataset, IterableDataset):  # it inherits the method, but has no samples of a number
            raise TypeError(f"WeightedDataset: samples of an IterableDataset cannot be chosen, got {describe(dataset)}")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int, float]:
        return self.dataset[index], int(index), _weight_of(index)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int, float]]:
        """A batch at once, as a ``DataLoader`` asks for it: by the dataset's own ``__getitems__`` where it has one."""
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = [self.dataset[index] for index in indices] if fetch is None else list(fetch(indices))
        if len(samples) != len(indices):
            raise ValueError(
                f"WeightedDataset: __getitems__ of {describe(self.dataset)} gave {len(samples)} samples for {len(indices)} indices"
            )
        return [(sample, int(index), _weight_of(index)) for sample, index in zip(samples, indices, strict=True)]


def _weight_of(index: int) -> float:
    if not isinstance(index, WeightedIndex):
        raise TypeError(f"WeightedDataset: the index has no weight, use a sampler of sam_kernels.sampling; got {describe(index)}")
    return index.weight


def weights_of(op: str, name: str, probabilities: Tensor) -> Tensor:  # (n,) -> (n,)
    """1 / (n p_i). Raises ValueError where one is too large for a number: ``name`` is what the probabilities came from."""
    weights = 1 / (len(probabilities) * probabilities)
    if not weights.isfinite().all():
        i = int((~weights.isfinite()).nonzero()[0])
        raise ValueError(f"{op}: {name}[{i}] is too small: its weight 1 / (n p_i) is not finite, p_i being {probabilities[i].item()!r}")
    return weights
