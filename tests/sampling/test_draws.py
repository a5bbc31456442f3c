"""Distributions over many draws, seeds and epochs, parts of replicas, states in the middle of an epoch."""

from __future__ import annotations

from collections import Counter
from itertools import chain, combinations, islice
from typing import Any

import pytest
import torch
from scipy import stats

from sam_kernels import sampling
from tests.sampling.helpers import SAMPLERS, Make, P, every_sampler, pairs

pytestmark = pytest.mark.usefixtures("one_thread")
NEVER = 1e-9  # how unlikely a sound sampler's result must be to be called wrong
DRAWS = 20_000


def assert_distributed(counts: list[int], probabilities: list[float]) -> None:
    """Each count by its exact binomial distribution, all together by chi square."""
    total = sum(counts)
    for count, p in zip(counts, probabilities, strict=True):
        low, high = stats.binom.ppf(NEVER, total, p), stats.binom.isf(NEVER, total, p)
        assert low <= count <= high
    square = sum((count - total * p) ** 2 / (total * p) for count, p in zip(counts, probabilities, strict=True))
    assert square < stats.chi2.isf(NEVER, len(counts) - 1)


def test_single_draws() -> None:
    counts = Counter(map(int, sampling.ImportanceSampler(P, num_samples=DRAWS)))
    assert_distributed([counts[i] for i in range(4)], P)
    indices, weights = sampling.ImportanceSampler(P).draw(DRAWS, torch.Generator().manual_seed(1))
    assert_distributed(indices.bincount().tolist(), P)
    assert torch.equal(weights, 1 / (4 * torch.tensor(P, dtype=torch.float64)[indices]))


def test_draws_of_a_batch_are_independent_of_each_other_and_of_the_batch_before() -> None:
    drawn = [tuple(map(int, batch)) for batch in sampling.ImportanceBatchSampler(P, batch_size=2, num_batches=DRAWS)]
    for found in (Counter(drawn), Counter((a[0], b[0]) for a, b in zip(drawn[::2], drawn[1::2], strict=True))):
        assert_distributed([found[i, j] for i in range(4) for j in range(4)], [p * q for p in P for q in P])


def test_subsets_are_uniform_and_independent_of_the_batch_before() -> None:
    drawn = [frozenset(map(int, batch)) for batch in sampling.TauNiceBatchSampler(6, 3, num_batches=DRAWS)]
    subsets = [frozenset(subset) for subset in combinations(range(6), 3)]
    counts = Counter(drawn)
    assert_distributed([counts[subset] for subset in subsets], [1 / 20] * 20)
    common = Counter(len(a & b) for a, b in zip(drawn[::2], drawn[1::2], strict=True))  # a permutation's batches would have none
    assert_distributed([common[k] for k in range(4)], [1 / 20, 9 / 20, 9 / 20, 1 / 20])


def test_sizes_of_independent_batches() -> None:
    sampler = sampling.IndependentBatchSampler([0.2] * 5, num_batches=DRAWS)
    sizes = Counter(0 if batch[0].weight == 0 else len(batch) for batch in sampler)  # type: ignore[attr-defined]
    assert_distributed([sizes[k] for k in range(6)], [float(stats.binom.pmf(k, 5, 0.2)) for k in range(6)])


def test_adaptive_draws_of_a_thousand() -> None:
    n = 1000
    sampler = sampling.AdaptiveImportanceSampler(n, 1000, num_batches=200, uniform_share=0.25)
    norms = torch.rand(n, generator=torch.Generator().manual_seed(2)) + 0.1
    sampler.update(torch.arange(n), norms)
    counts = Counter(int(i) for batch in sampler for i in batch)
    expected = 0.75 * norms.double() / norms.double().sum() + 0.25 / n
    torch.testing.assert_close(sampler.probabilities, expected)
    assert_distributed([counts[i] for i in range(n)], sampler.probabilities.tolist())


@every_sampler
def test_draws_follow_from_seed_and_epoch(make: Make) -> None:
    first, again, other = make(num_batches=30), make(num_batches=30), make(num_batches=30, seed=1)
    epochs = [pairs(first), pairs(first)]
    assert [len(epoch) for epoch in epochs] == [30, 30] == [len(first)] * 2
    assert epochs[0] != epochs[1]
    assert epochs == [pairs(again), pairs(again)]
    again.set_epoch(0)
    assert pairs(again) == epochs[0]
    again.set_epoch(1)
    assert pairs(again) == epochs[1]
    assert again.epoch == 1
    other_epochs = [pairs(other), pairs(other)]
    assert all(mine != theirs for mine in epochs for theirs in other_epochs)  # epoch 0 of seed 1 is not epoch 1 of seed 0


@every_sampler
def test_an_epoch_that_was_broken_off_is_followed_by_a_whole_one(make: Make) -> None:
    sampler, straight = make(num_batches=10), make(num_batches=10)
    list(islice(iter(sampler), 3))
    pairs(straight)
    assert pairs(sampler) == pairs(straight)


@pytest.mark.parametrize(
    ("name", "num_replicas"), [*((name, 2) for name in SAMPLERS), *((name, 4) for name in ("single", "tau_nice", "independent", "sparse"))]
)
def test_replicas_take_parts_of_the_same_draws(name: str, num_replicas: int) -> None:
    make = SAMPLERS[name]
    ranks = [pairs(make(num_batches=40, num_replicas=num_replicas, rank=rank)) for rank in range(num_replicas)]
    whole = make(num_batches=40 if name != "single" else 40 * num_replicas)
    batches = pairs(whole)
    if name == "single":
        batches = [list(chain(*batches[k : k + num_replicas])) for k in range(0, len(batches), num_replicas)]
    for batch, *parts in zip(batches, *ranks, strict=True):
        drawn = sorted(index for index, weight in chain(*parts) if weight)
        assert drawn == sorted(index for index, weight in batch if weight)
        if not isinstance(whole, sampling.IndependentBatchSampler):
            assert len({len(part) for part in parts}) == 1
            assert sorted(chain(*parts)) == sorted(batch)


def test_uneven_numbers_of_samples_are_rounded_up() -> None:
    assert [len(list(sampling.ImportanceSampler(P, num_samples=5, num_replicas=3, rank=rank))) for rank in range(3)] == [2, 2, 2]


def resumed(make: Make, state: dict[str, Any], **kwargs: Any) -> Any:
    sampler = make(num_batches=12, **kwargs)
    sampler.load_state_dict(state)
    return sampler


@every_sampler
@pytest.mark.parametrize("epoch", [0, 2])
def test_a_state_goes_on_with_exactly_the_draws_that_are_left(make: Make, epoch: int) -> None:
    straight = make(num_batches=12)
    epochs = [pairs(straight) for _ in range(epoch + 2)]
    sampler = make(num_batches=12)
    for _ in range(epoch):
        pairs(sampler)
    drawn = iter(sampler)
    for done in range(1, 13):
        next(drawn)
        later = resumed(make, sampler.state_dict(), seed=5)  # the seed is part of the state
        expected = epochs[epoch][done:]
        if expected:
            if done % 2:
                later.set_epoch(epoch)  # what a loop over epochs does anyway
            assert pairs(later) == expected
        assert pairs(later) == epochs[epoch + 1]


@every_sampler
def test_a_state_can_leave_out_what_was_drawn_ahead(make: Make) -> None:
    straight = pairs(make(num_batches=12))
    sampler = make(num_batches=12)
    list(islice(iter(sampler), 8))
    for used in range(9):
        assert pairs(resumed(make, sampler.state_dict(used))) == straight[used:]
    with pytest.raises(ValueError, match="position must be at most 8, got 9"):
        sampler.state_dict(9)


@every_sampler
def test_setting_another_epoch_forgets_the_position(make: Make) -> None:
    straight = make(num_batches=12)
    epochs = [pairs(straight), pairs(straight)]
    sampler = make(num_batches=12)
    list(islice(iter(sampler), 5))
    later = resumed(make, sampler.state_dict())
    later.set_epoch(1)
    assert pairs(later) == epochs[1]


@every_sampler
def test_states_that_do_not_fit_are_refused_and_change_nothing(make: Make) -> None:
    sampler = make(num_batches=12)
    list(islice(iter(sampler), 5))
    state = sampler.state_dict()
    for wrong, error in (
        ({**state, "position": 13}, "position must be at most 12"),
        ({**state, "epoch": -1}, "epoch must be at least 0"),
        ({key: state[key] for key in state if key != "seed"}, r"state_dict must have the keys \[.*'seed'"),
    ):
        with pytest.raises(ValueError, match=f"{type(sampler).__name__}: {error}"):
            sampler.load_state_dict(wrong)
    with pytest.raises(TypeError, match="state_dict must be a dict, got list"):
        sampler.load_state_dict([])
    assert pairs(resumed(make, sampler.state_dict())) == pairs(resumed(make, state))
