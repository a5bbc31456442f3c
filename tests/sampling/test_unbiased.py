"""The weighted mean of gradients is unbiased: every outcome of a draw there is, by the samplers' own iteration and weights."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from sam_kernels import sampling
from tests.sampling.helpers import OUTCOMES, SAMPLERS, P, adaptive, all_draws

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = torch.finfo(torch.float64).eps


def gradients(n: int) -> Tensor:  # (n, 3)
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_mean_of_weighted_gradients_is_unbiased(name: str, num_replicas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n = {"tau_nice": 5, "adaptive": 5, "sparse": 3}.get(name, 4)
    g = gradients(n)
    means = []
    for ranks in all_draws(name, monkeypatch, num_replicas):
        of_ranks = [torch.stack([i.weight * g[i] for i in batch]).mean(0) for batch in ranks]
        means.append(torch.stack(of_ranks).mean(0))  # as DistributedDataParallel takes it
    error = (torch.stack(means).mean(0) - g.mean(0)).abs().max().item()
    # A sum of as many terms as there are outcomes, each of a few roundings, with weights up to 8.
    assert error < len(means) * EPS * 8 * g.abs().max().item()


def test_drawing_again_where_a_batch_is_empty_would_be_biased(monkeypatch: pytest.MonkeyPatch) -> None:
    g = gradients(3)
    weights = SAMPLERS["sparse"](num_batches=1).weights
    batches = [batch for (batch,) in all_draws("sparse", monkeypatch) if batch[0].weight > 0]
    assert len(batches) < len(OUTCOMES["sparse"])
    means = torch.stack([sum(weights[int(i)] * g[i] for i in batch) for batch in batches]).mean(0)  # type: ignore[misc]
    torch.testing.assert_close(means, g.mean(0) / (1 - 0.75 * 0.75 * 0.5))


@pytest.mark.parametrize("name", ["single", "with_replacement"])
def test_every_sample_comes_as_often_as_its_probability_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counter(int(i) for (batch,) in all_draws(name, monkeypatch) for i in batch)
    total = sum(counts.values())
    assert [counts[i] / total for i in range(4)] == P
    sampler = SAMPLERS[name](num_batches=1)
    assert sampler.probabilities.tolist() == P
    assert sampler.weights.tolist() == [1 / (4 * p) for p in P]


def test_every_subset_comes_as_often_in_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [tuple(map(int, batch)) for (batch,) in all_draws("tau_nice", monkeypatch)]
    assert sorted(drawn) == sorted(itertools.permutations(range(5), 4))


def test_independent_draws_come_as_often_as_their_probabilities_say(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Counter(frozenset(map(int, batch)) for (batch,) in all_draws("independent", monkeypatch))
    p = [0.25, 0.5, 1.0, 0.75]
    for size in range(5):
        for subset in itertools.combinations(range(4), size):
            expected = 1.0
            for i in range(4):
                expected *= p[i] if i in subset else 1 - p[i]
            assert drawn[frozenset(subset)] / 256 == expected


def test_weights_of_independent_batches_are_sums_written_as_means(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = SAMPLERS["independent"](num_batches=1).weights
    for (batch,) in all_draws("independent", monkeypatch):
        assert [i.weight for i in batch] == [len(batch) * weights[int(i)].item() for i in batch]
    empty = [batch for (batch,) in all_draws("sparse", monkeypatch) if batch[0].weight == 0]
    assert len(empty) / 64 == 0.75 * 0.75 * 0.5
    assert {len(batch) for batch in empty} == {1}
    assert {int(batch[0]) for batch in empty} == {0, 1, 2}


def test_probabilities_of_the_adaptive_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = adaptive(num_batches=1)
    expected = [0.5 * e / 5 + 0.5 / 5 for e in (1, 2, 0, 1, 1)]  # the mean of what was seen for the last one
    assert sampler.probabilities.tolist() == pytest.approx(expected, rel=4 * EPS)
    counts = Counter(int(i) for (batch,) in all_draws("adaptive", monkeypatch) for i in batch)
    assert [counts[i] / 200 for i in range(5)] == pytest.approx(expected, rel=4 * EPS)


def test_lipschitz_constants_are_probabilities() -> None:
    sampler = sampling.ImportanceSampler(lipschitz=torch.tensor([3.0, 1.0, 4.0]))
    assert sampler.probabilities.tolist() == [3 / 8, 1 / 8, 4 / 8]
    assert len(sampler) == 3
    huge = sampling.ImportanceSampler(lipschitz=[1e308, 1e308, 0.5e308, 1.5e308])
    assert huge.probabilities.tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 8, 3 / 8])
    assert set(map(int, sampling.ImportanceSampler(lipschitz=[1e308, 1e308], num_samples=50))) == {0, 1}
    batches = sampling.ImportanceBatchSampler(lipschitz=[3, 1, 4], batch_size=2)
    assert torch.equal(batches.weights, sampler.weights)
    assert len(batches) == 1
