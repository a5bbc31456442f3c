"""Samplers that are copied, saved and gone on with: what they own, and which states they take."""

from __future__ import annotations

import copy
import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch

from sam_kernels.sampling import AdaptiveImportanceSampler
from tests.sampling.helpers import adaptive

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
