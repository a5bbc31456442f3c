"""Samplers that are copied, saved and gone on with: what they own, and which states they take."""

from __future__ import annotations

import copy
import pickle
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch

from sam_kernels import sampling
from sam_kernels.sampling import AdaptiveImportanceSampler
from tests.sampling.helpers import Make, adaptive, every_sampler, pairs

pytestmark = pytest.mark.usefixtures("one_thread")


def weighted_frequencies(sampler: AdaptiveImportanceSampler) -> torch.Tensor:  # (n,): 1 each where weights are those of the draws
    found = torch.zeros(sampler.data_size, dtype=torch.float64)
    batches = list(sampler)
    for batch in batches:
        for index in batch:
            found[int(index)] += index.weight  # type: ignore[attr-defined]
    return found * sampler.data_size / (len(batches) * sampler.batch_size)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))], ids=["deepcopy", "pickle"])
def test_copies_are_unbiased_after_an_update(copied: Any) -> None:
    sampler = copied(AdaptiveImportanceSampler(4, 1000, num_batches=40))
    sampler.update(torch.arange(4), torch.tensor([8.0, 1.0, 1.0, 0.0]))
    assert sampler.estimates.tolist() == [8.0, 1.0, 1.0, 0.0]
    # 40,000 draws of weights at most 5: a deviation of 0.01 each.
    torch.testing.assert_close(weighted_frequencies(sampler), torch.ones(4, dtype=torch.float64), rtol=0, atol=0.08)


def test_a_sampler_from_another_process_owns_its_memory() -> None:
    """Tensors sent to a process (``mp.spawn``) are shared with the sender: an update there would be one here."""
    sampler = adaptive(num_batches=3)
    other = pickle.loads(bytes(ForkingPickler.dumps(sampler)))
    other.update(torch.arange(5), torch.full((5,), 7.0))
    list(other)
    assert sampler.estimates[:4].tolist() == [1.0, 2.0, 0.0, 1.0]
    assert sampler.estimates[4].isnan()
    assert not any(tensor.is_shared() for tensor in (other._tree._nodes, other._indices, other._weights))


@every_sampler
def test_a_position_before_the_loaded_one_is_refused(make: Make) -> None:
    sampler, other = make(num_batches=9), make(num_batches=9)
    straight = pairs(make(num_batches=9))
    list(islice(iter(sampler), 4))
    other.load_state_dict(sampler.state_dict())
    list(islice(iter(other), 3))
    with pytest.raises(ValueError, match=f"{type(sampler).__name__}: position must be at least 4, got 3"):
        other.state_dict(3)
    for used in (4, 5, 7):  # from the epoch's beginning
        later = make(num_batches=9)
        later.load_state_dict(other.state_dict(used))
        assert pairs(later) == straight[used:]
    pairs(other)
    assert other.state_dict(0)["position"] == 0  # of the next epoch


OTHERS: list[tuple[Any, Any, str]] = [
    (sampling.ImportanceSampler([0.5, 0.5]), sampling.ImportanceSampler([0.5, 0.5], num_samples=3), "steps 2"),
    (sampling.ImportanceSampler([0.5] * 2, num_samples=5), sampling.ImportanceSampler([0.2] * 5), "data_size 2"),
    (
        sampling.ImportanceSampler([0.5] * 2),
        sampling.ImportanceSampler([0.5] * 2, num_samples=4, num_replicas=2, rank=0),
        "num_replicas 1",
    ),
    (
        sampling.ImportanceBatchSampler([0.5] * 2, batch_size=2, num_batches=3),
        sampling.ImportanceBatchSampler([0.5] * 2, batch_size=4, num_batches=3),
        "batch_size 2",
    ),
    (sampling.TauNiceBatchSampler(6, 3), sampling.TauNiceBatchSampler(7, 3), "data_size 6"),
    (sampling.TauNiceBatchSampler(6, 3), sampling.TauNiceBatchSampler(6, 2, num_batches=2), "batch_size 3"),
    (sampling.IndependentBatchSampler([0.5] * 2), sampling.IndependentBatchSampler([0.5] * 4), "data_size 2"),
    (
        sampling.TauNiceBatchSampler(6, 3),
        sampling.ImportanceBatchSampler([1 / 6] * 6, batch_size=3),
        "sampler 'TauNiceBatchSampler'",
    ),
    (AdaptiveImportanceSampler(6, 3), sampling.TauNiceBatchSampler(6, 3), "sampler 'AdaptiveImportanceSampler'"),
    (AdaptiveImportanceSampler(6, 3), AdaptiveImportanceSampler(6, 3, num_batches=5), "steps 2"),
]


@pytest.mark.parametrize(("sampler", "other", "what"), OTHERS, ids=[what for _, _, what in OTHERS])
def test_states_of_another_sampler_are_refused(sampler: Any, other: Any, what: str) -> None:
    with pytest.raises(ValueError, match=f"{type(other).__name__}: state_dict is of {what}, this sampler's is"):
        other.load_state_dict(sampler.state_dict())


INDICES, WEIGHTS = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"estimates": [1.0] * 5}, TypeError, r"\['estimates'\] must be a torch.Tensor, got list"),
        ({"estimates": torch.ones(5, dtype=torch.int64)}, TypeError, r"\['estimates'\] has dtype torch.int64"),
        ({"estimates": torch.ones(4)}, ValueError, r"\['estimates'\] must have the shape \(5,\), got \(4,\)"),
        ({"estimates": torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0])}, ValueError, r"\['estimates'\] must be NaN or in \[0, 1.8e\+307\]"),
        ({"estimates": torch.tensor([1.0, 1.0, torch.inf, 1.0, 1.0])}, ValueError, r"\['estimates'\] must be NaN or in"),
        ({"indices": INDICES.int()}, TypeError, r"\['indices'\] must be an int64 tensor, got a torch.int32"),
        ({"indices": None}, TypeError, r"\['indices'\] must be an int64 tensor, got None"),
        ({"indices": INDICES + 5}, ValueError, r"\['indices'\] must be in \[0, 5\)"),
        ({"indices": INDICES - 1}, ValueError, r"\['indices'\] must be in \[0, 5\)"),
        ({"indices": INDICES[:, :1]}, ValueError, r"must both have a shape \(at most 3, 2\), got \(2, 1\) and \(2, 2\)"),
        ({"indices": INDICES[:1]}, ValueError, "must both have a shape"),
        ({"indices": INDICES.repeat(2, 1), "weights": WEIGHTS.repeat(2, 1)}, ValueError, "must both have a shape"),
        ({"weights": WEIGHTS.long()}, TypeError, r"\['weights'\] has dtype torch.int64"),
        ({"weights": WEIGHTS * torch.inf}, ValueError, r"\['weights'\] must be finite and more than 0"),
        ({"weights": WEIGHTS * 0}, ValueError, r"\['weights'\] must be finite and more than 0"),
    ],
)
def test_tensors_of_an_adaptive_state_are_checked_before_anything_changes(
    wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    sampler, other = adaptive(num_batches=5), adaptive(num_batches=5, seed=3)
    list(islice(iter(sampler), 4))
    state = sampler.state_dict(2)
    expected = pairs(adaptive(num_batches=5, seed=3))
    with pytest.raises(error, match=f"AdaptiveImportanceSampler: state_dict.*{message}"):
        other.load_state_dict({**state, **wrong})
    assert other.estimates[:4].tolist() == [1.0, 2.0, 0.0, 1.0]
    assert pairs(other) == expected


def test_estimates_of_another_precision_are_taken() -> None:
    sampler, other = adaptive(num_batches=5), adaptive(num_batches=5)
    state = sampler.state_dict()
    other.load_state_dict({**state, "estimates": state["estimates"].float().requires_grad_()})
    assert pairs(other) == pairs(sampler)


@every_sampler
def test_an_iterator_of_before_cannot_go_on(make: Make) -> None:
    straight = make(num_batches=6)
    epochs = [pairs(straight), pairs(straight)]
    for disturb in (lambda s: next(iter(s)), lambda s: s.set_epoch(1), lambda s: s.load_state_dict(s.state_dict())):
        sampler = make(num_batches=6)
        old = iter(sampler)
        assert pairs(islice(old, 2)) == epochs[0][:2]
        disturb(sampler)
        with pytest.raises(RuntimeError, match=f"{type(sampler).__name__} was iterated anew"):
            next(old)
        sampler.set_epoch(1)
        assert pairs(sampler) == epochs[1]
    sampler = make(num_batches=6)
    old = iter(sampler)
    assert pairs(islice(old, 6)) == epochs[0]
    sampler.set_epoch(1)
    assert list(old) == []  # at its end it loses nothing
