"""The sampler that learns: estimates, the tree of sums below them, weights of the time of drawing."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from sam_kernels.sampling import AdaptiveImportanceSampler
from sam_kernels.sampling._tree import SumTree
from tests.helpers.ranks import on_ranks, one_at_a_time
from tests.sampling.helpers import pairs

pytestmark = pytest.mark.usefixtures("one_thread")
HUGE = torch.tensor([2.0**1021 - 2.0**968] * 2, dtype=torch.float64)  # an eighth of the largest number, times 1 - 2^-53


def sums_of(leaves: torch.Tensor) -> torch.Tensor:
    """All nodes of the tree, level by level."""
    levels = [leaves]
    while len(levels[0]) > 1:
        levels.insert(0, levels[0][0::2] + levels[0][1::2])
    return torch.cat([torch.zeros(1, leaves.shape[1], dtype=torch.float64), *levels])


@pytest.mark.parametrize("n", [1, 2, 3, 8, 37])
def test_sums_are_those_of_the_leaves_bit_for_bit_after_any_changes(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    tree, leaves = SumTree(n, 2), torch.zeros(1 << (n - 1).bit_length(), 2, dtype=torch.float64)
    for step in range(50):
        indices = torch.randperm(n, generator=generator)[: 1 + n // 3 if step % 5 else n]  # all at once is another way
        values = torch.rand(len(indices), 2, generator=generator, dtype=torch.float64) * 10.0 ** torch.randint(-9, 9, (1,))
        tree.set_(indices, values)
        leaves[indices] = values
        assert torch.equal(tree._nodes, sums_of(leaves))
    assert torch.equal(tree.leaves, leaves[:n])
    assert torch.equal(tree.total, sums_of(leaves)[1])


@pytest.mark.parametrize("n", [1, 5, 16, 33])
def test_a_leaf_is_found_by_its_share(n: int) -> None:
    lengths = torch.randint(0, 4, (n, 2), generator=torch.Generator().manual_seed(n)).double()
    lengths[-1] = 1.0
    tree, factors = SumTree(n, 2), torch.tensor([1.0, 2.0], dtype=torch.float64)
    tree.set_(torch.arange(n), lengths)
    mass = (lengths @ factors).long()  # whole numbers: every sum is exact
    points = torch.arange(int(mass.sum())).double() + 0.5
    assert torch.equal(tree.find(points, factors), torch.arange(n).repeat_interleave(mass))
    assert torch.equal(tree.find(points - 0.5, factors), torch.arange(n).repeat_interleave(mass))
    beyond = mass.sum().double().reshape(1) * 2
    assert mass[tree.find(beyond, factors)] > 0  # what rounding may ask for


def test_the_largest_norms_are_still_numbers() -> None:
    sampler = AdaptiveImportanceSampler(4, 2, num_batches=50)
    sampler.update(torch.tensor([0, 1]), HUGE)
    sampler.update(torch.tensor([0, 0, 1, 2]), HUGE[0].repeat(4))
    assert sampler.probabilities.tolist() == [0.25] * 4
    assert {weight for batch in pairs(sampler) for _, weight in batch} == {1.0}


def test_estimates_are_moving_averages() -> None:
    sampler = AdaptiveImportanceSampler(4, 2, decay=0.75)
    assert sampler.estimates.isnan().all()
    assert sampler.probabilities.tolist() == [0.25] * 4
    sampler.update(torch.tensor([1, 3]), torch.tensor([2.0, 4.0], dtype=torch.bfloat16))
    sampler.update(torch.tensor([1]), torch.tensor([10.0]))
    sampler.update(torch.tensor([2, 3, 2]), torch.tensor([1.0, 0.0, 2.0]))  # twice in a batch is one update with the mean
    assert sampler.estimates[1:].tolist() == [0.75 * 2 + 0.25 * 10, 1.5, 0.75 * 4]
    assert sampler.estimates[0].isnan()
    sampler.update(torch.empty(0, dtype=torch.int64), torch.empty(0))
    assert sampler.estimates[1:].tolist() == [4.0, 1.5, 3.0]


def test_probabilities_do_not_depend_on_the_scale_of_norms() -> None:
    samplers = [AdaptiveImportanceSampler(5, 2, num_batches=20) for _ in range(2)]
    for sampler, scale in zip(samplers, (1.0, 2.0**40), strict=True):
        sampler.update(torch.tensor([0, 1, 4]), torch.tensor([1.0, 3.0, 0.5]) * scale)
    assert torch.equal(samplers[0].probabilities, samplers[1].probabilities)
    assert pairs(samplers[0]) == pairs(samplers[1])


def test_without_a_gradient_anywhere_sampling_is_uniform() -> None:
    sampler = AdaptiveImportanceSampler(4, 2, num_batches=50)
    sampler.update(torch.tensor([0, 1, 2]), torch.zeros(3))
    assert sampler.probabilities.tolist() == [0.25] * 4
    assert {weight for batch in pairs(sampler) for _, weight in batch} == {1.0}


def test_weights_are_bounded_and_those_of_the_time_of_drawing() -> None:
    sampler = AdaptiveImportanceSampler(50, 5, num_batches=60, uniform_share=0.1)
    generator = torch.Generator().manual_seed(0)
    changed, ahead = 0, []  # what a DataLoader does: batches wait, and updates come in between
    for batch in sampler:
        ahead.append((batch, sampler.probabilities))
        if len(ahead) > 3:
            used, probabilities = ahead.pop(0)
            indices = torch.tensor(used)
            weights = torch.tensor([i.weight for i in used], dtype=torch.float64)  # type: ignore[attr-defined]
            torch.testing.assert_close(weights, 1 / (50 * probabilities[indices]))
            assert weights.max() <= 1 / 0.1 * (1 + 1e-12)
            changed += not torch.allclose(probabilities, sampler.probabilities)
            sampler.update(indices, torch.rand(5, generator=generator) ** 4)
    assert changed > 50


def run(sampler: AdaptiveImportanceSampler, start: int, ahead: int) -> tuple[list[Any], list[dict[str, Any]]]:
    """An epoch from step ``start`` on that draws ``ahead`` batches in advance: the batches, and the states after each."""
    used, states, drawn = [], [], iter(sampler)
    waiting = list(islice(drawn, ahead))
    for step in range(start, len(sampler)):
        waiting += islice(drawn, 1)
        batch = waiting.pop(0)
        sampler.update(torch.tensor(batch), torch.tensor([float((step * 7 + i) % 11) for i in batch]))
        used += pairs([batch])
        states.append(sampler.state_dict(step + 1))
    return used, states


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("step", [1, 7, 14])
def test_it_goes_on_exactly_where_it_was_with_updates_in_between(ahead: int, step: int) -> None:
    straight, other = (AdaptiveImportanceSampler(9, 3, num_batches=15) for _ in range(2))
    used, states = run(straight, 0, ahead)
    assert len(states[step - 1]["indices"]) == min(ahead, 15 - step)
    other.load_state_dict(states[step - 1])
    again, _ = run(other, step, ahead)
    assert again == used[step:]
    torch.testing.assert_close(other.estimates, straight.estimates, rtol=0, atol=0, equal_nan=True)
    assert run(other, 0, ahead)[0] == run(straight, 0, ahead)[0]  # the next epoch


def test_states_of_other_sizes_are_refused() -> None:
    state = AdaptiveImportanceSampler(9, 3, num_batches=15).state_dict()
    for other in (AdaptiveImportanceSampler(8, 3, num_batches=15), AdaptiveImportanceSampler(9, 2, num_batches=15)):
        with pytest.raises(ValueError, match=r"AdaptiveImportanceSampler: state_dict is of (data_size 9|batch_size 3), this sampler's is"):
            other.load_state_dict(state)


@pytest.mark.parametrize(
    ("indices", "norms", "error", "message"),
    [
        ([0, 1], torch.ones(2), TypeError, "indices must be an int64 tensor of one dimension, got list"),
        (torch.zeros(2), torch.ones(2), TypeError, "indices must be an int64 tensor"),
        (torch.tensor([0, 1]), [1.0, 1.0], TypeError, r"norms must be a torch\.Tensor"),
        (torch.tensor([0, 1]), torch.ones(2, dtype=torch.int64), TypeError, "norms has dtype torch.int64"),
        (torch.tensor([0, 1]), torch.ones(3), ValueError, r"norms must have the shape of indices \(2,\)"),
        (torch.tensor([0, 4]), torch.ones(2), ValueError, r"indices must be in \[0, 4\), got 4"),
        (torch.tensor([0, -1]), torch.ones(2), ValueError, r"indices must be in \[0, 4\), got -1"),
        (torch.tensor([0, 1]), torch.tensor([1.0, torch.nan]), ValueError, r"norms must be finite and at least 0, got norms\[1\] = nan"),
        (torch.tensor([0, 1]), torch.tensor([torch.inf, 1.0]), ValueError, r"norms must be finite and at least 0, got norms\[0\] = inf"),
        (torch.tensor([0, 1]), torch.tensor([1.0, -0.5]), ValueError, r"norms must be finite and at least 0, got norms\[1\] = -0\.5"),
        (torch.tensor([0, 1]), HUGE * 2, ValueError, r"norms must be at most 2\.25e\+307, got 4\.49"),
        (torch.zeros(9, dtype=torch.int64), HUGE[0].repeat(9), ValueError, r"norms must be at most 9\.99e\+306, got 2\.24"),
    ],
)
def test_updates_that_are_refused_change_nothing(indices: object, norms: object, error: type[Exception], message: str) -> None:
    sampler = AdaptiveImportanceSampler(4, 2)
    with pytest.raises(error, match=f"AdaptiveImportanceSampler.update: {message}"):
        sampler.update(indices, norms)  # type: ignore[arg-type]
    assert sampler.estimates.isnan().all()


def _learnt(rank: int) -> torch.Tensor:
    sampler = AdaptiveImportanceSampler(20, 4, num_batches=6)
    assert (sampler.num_replicas, sampler.rank) == (2, rank)
    for batch in sampler:
        assert len(batch) == 2
        sampler.update(torch.tensor(batch), torch.tensor([float(i * i) for i in batch]))
    refused: list[tuple[Any, torch.Tensor]] = [
        (torch.tensor([3]), torch.tensor([-1.0 if rank else 1.0])),
        ([3] if rank else torch.tensor([3]), torch.ones(1)),
    ]
    for indices, norms in refused:  # by rank 1
        with pytest.raises((TypeError, ValueError), match=r"^AdaptiveImportanceSampler\.update of rank 1: "):
            sampler.update(indices, norms)
    return sampler.estimates


@one_at_a_time
def test_replicas_learn_from_each_other(tmp_path: Path) -> None:
    alone = AdaptiveImportanceSampler(20, 4, num_batches=6)
    for batch in alone:
        alone.update(torch.tensor(batch), torch.tensor([float(i * i) for i in batch]))
    for found in on_ranks(_learnt, tmp_path):
        torch.testing.assert_close(found, alone.estimates, rtol=0.0, atol=0.0, equal_nan=True)
