"""In a DataLoader: with and without workers, for several epochs, stopped and gone on with, and in a training step."""

from __future__ import annotations

import copy
import pickle
import re
from itertools import islice
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, ChainDataset, DataLoader, Dataset, Subset, TensorDataset

import sam_kernels
from sam_kernels import sampling
from sam_kernels.per_sample import GradNorms
from sam_kernels.sampling import WeightedDataset, WeightedIndex
from tests.sampling.helpers import Make, every_sampler, pairs

DATA = torch.arange(5.0) * 10
SINGLE = sampling.ImportanceSampler


def loader_of(sampler: Any, **kwargs: Any) -> DataLoader[Any]:
    dataset = WeightedDataset(TensorDataset(DATA))
    if isinstance(sampler, SINGLE):
        return DataLoader(dataset, sampler=sampler, batch_size=1, **kwargs)
    return DataLoader(dataset, batch_sampler=sampler, **kwargs)


def seen(batches: Any) -> list[list[tuple[int, float]]]:
    """Indices and weights as they come out, with the samples they belong to."""
    found = []
    for (values,), indices, weights in batches:
        assert torch.equal(values, DATA[indices])
        assert weights.dtype is torch.float64
        found.append(list(zip(indices.tolist(), weights.tolist(), strict=True)))
    return found


@every_sampler
@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 3}], ids=str)
def test_batches_are_the_sampler_s_own(make: Make, workers: dict[str, Any]) -> None:
    straight = make(num_batches=7)
    loader = loader_of(make(num_batches=7), **workers)
    assert len(loader) == 7
    for _ in range(3):
        assert seen(loader) == pairs(straight)


@every_sampler
def test_workers_that_have_drawn_ahead_lose_nothing(make: Make) -> None:
    straight = make(num_batches=9)
    epochs = [pairs(straight), pairs(straight)]
    sampler = make(num_batches=9)
    loader = loader_of(sampler, num_workers=2)
    assert seen(islice(loader, 4)) == epochs[0][:4]
    assert sampler.state_dict()["position"] > 4  # what the position is for
    later = make(num_batches=9)
    later.load_state_dict(pickle.loads(pickle.dumps(sampler.state_dict(4))))
    loader = loader_of(later, num_workers=2, persistent_workers=True)
    assert seen(loader) == epochs[0][4:]
    assert seen(loader) == epochs[1]


def test_an_adaptive_sampler_goes_on_exactly_with_as_many_workers() -> None:
    def train(sampler: Any, start: int) -> tuple[list[Any], dict[int, Any]]:
        used, states = [], {}
        for step, batch in enumerate(loader_of(sampler, num_workers=2), start + 1):
            used += seen([batch])
            sampler.update(batch[1], batch[1].float() ** 2 + step % 3)
            states[step] = sampler.state_dict(step)
        return used, states

    make = lambda: sampling.AdaptiveImportanceSampler(5, 3, num_batches=12)  # noqa: E731
    used, states = train(make(), 0)
    for step in (1, 5, 11):
        sampler = make()
        sampler.load_state_dict(states[step])
        assert train(sampler, step)[0] == used[step:]


def test_a_batch_of_draws_from_torch_s_batch_sampler() -> None:
    sampler = SINGLE(lipschitz=[1.0, 2.0, 3.0, 4.0, 5.0], num_samples=7)
    found = seen(DataLoader(WeightedDataset(TensorDataset(DATA)), batch_size=3, sampler=sampler))
    assert [len(batch) for batch in found] == [3, 3, 1]
    assert sum(found, []) == [pair for (pair,) in pairs(SINGLE(lipschitz=[1.0, 2.0, 3.0, 4.0, 5.0], num_samples=7))]  # noqa: RUF017
    sampler.set_epoch(0)
    batches = BatchSampler(sampler, 3, drop_last=True)
    assert seen(DataLoader(WeightedDataset(TensorDataset(DATA)), batch_sampler=batches)) == found[:2]


@pytest.mark.parametrize("data", [DATA, DATA.numpy(), DATA.tolist(), TensorDataset(DATA), Subset(TensorDataset(DATA), [3, 1, 0, 2, 4])])
def test_indices_are_ordinary_ones_for_any_dataset(data: Any) -> None:
    index = WeightedIndex(3, 0.25)
    assert index == 3
    plain = data[3]
    assert (data[index] == plain) if not isinstance(plain, tuple) else (data[index][0] == plain[0])
    sample, number, weight = WeightedDataset(data)[index]
    assert type(number) is int
    assert (number, weight) == (3, 0.25)
    assert np.asarray(sample) == np.asarray(plain)
    assert len(WeightedDataset(data)) == 5
    for other in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        assert type(other) is WeightedIndex
        assert (other, other.weight) == (3, 0.25)
    assert index.__reduce__() == (WeightedIndex, (3, 0.25))  # and nothing twice
    assert repr(index) == "WeightedIndex(3, weight=0.25)"


def test_an_empty_batch_arrives_as_a_sample_of_weight_0() -> None:
    found = seen(loader_of(sampling.IndependentBatchSampler([1e-9] * 5, num_batches=3), num_workers=1))
    assert [[weight for _, weight in batch] for batch in found] == [[0.0]] * 3


def test_an_index_without_a_weight_is_refused() -> None:
    with pytest.raises(TypeError, match=r"WeightedDataset: the index has no weight, .*got 3 \(int\)"):
        WeightedDataset(DATA)[3]
    with pytest.raises(TypeError, match="WeightedDataset: the index has no weight"):
        next(iter(DataLoader(WeightedDataset(TensorDataset(DATA)), batch_size=2)))
    with pytest.raises(TypeError, match="WeightedDataset: dataset must have __getitem__, got 3"):
        WeightedDataset(3)
    with pytest.raises(TypeError, match="WeightedDataset: samples of an IterableDataset cannot be chosen, got ChainDataset"):
        WeightedDataset(ChainDataset([]))


def test_batches_are_fetched_at_once_where_the_dataset_can() -> None:
    asked = []

    class Fetching(Dataset[float]):
        def __getitems__(self, indices: list[int]) -> list[float]:
            asked.append(list(indices))
            return [float(i) for i in indices]

        def __getitem__(self, index: int) -> float:
            raise AssertionError

    sampler = sampling.TauNiceBatchSampler(5, 2, num_batches=4)
    values = [values.tolist() for values, _, _ in DataLoader(WeightedDataset(Fetching()), batch_sampler=sampler)]
    assert values == asked == [[index for index, _ in batch] for batch in pairs(sampling.TauNiceBatchSampler(5, 2, num_batches=4))]


def test_a_batch_of_another_length_is_refused() -> None:
    class Losing(Dataset[float]):
        def __getitems__(self, indices: list[int]) -> list[float]:
            return [float(i) for i in indices[1:]]

        def __getitem__(self, index: int) -> float:
            raise AssertionError

    with pytest.raises(ValueError, match="WeightedDataset: __getitems__ of Losing gave 1 samples for 2 indices"):
        next(iter(DataLoader(WeightedDataset(Losing()), batch_sampler=sampling.TauNiceBatchSampler(5, 2))))


def test_a_weighted_step_of_sam_is_the_formula_s() -> None:
    a, b = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    opt = sam_kernels.UnifiedSAM([w], torch.optim.SGD, rho=0.1, lambd=0.5, lr=0.05)
    sampler = sampling.ImportanceBatchSampler(lipschitz=a.square().sum(1), batch_size=2, num_batches=4)
    x = w.detach().clone()

    def gradient(at: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return (weights * (a[indices] @ at - b[indices])) @ a[indices] / len(indices)

    for (rows, targets), indices, weights in DataLoader(WeightedDataset(TensorDataset(a, b)), batch_sampler=sampler):

        def closure(rows: Tensor = rows, targets: Tensor = targets, weights: Tensor = weights) -> Tensor:
            opt.zero_grad()
            loss = (weights * (rows @ w - targets).square() / 2).mean()
            loss.backward()
            return loss

        opt.step(closure)
        g = gradient(x, indices, weights)
        x = x - 0.05 * gradient(x + 0.1 * (0.5 + 0.5 / g.norm()) * g, indices, weights)
        torch.testing.assert_close(w.detach(), x)


@pytest.mark.parametrize("name", ["docs/sampling.md", "sam_kernels/sampling/adaptive.py", "sam_kernels/sampling/_weighted.py"])
def test_the_examples_run(name: str) -> None:
    """Code blocks of the page in one namespace, and those of the docstrings."""
    torch.manual_seed(0)
    text = (Path(__file__).parents[2] / name).read_text()
    model = torch.nn.Linear(4, 3)
    space: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "DataLoader": DataLoader, "GradNorms": GradNorms, "model": model}
    space |= {name: getattr(sampling, name) for name in sampling.__all__}
    space["dataset"] = TensorDataset(torch.randn(64, 4), torch.randint(0, 3, (64,)))
    in_docstring = re.findall(r"::\n\n((?:        .*\n)+)", text)[:1]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL) if name.endswith(".md") else [dedent(in_docstring[0])]
    assert blocks
    for block in blocks:
        exec(block, space)
