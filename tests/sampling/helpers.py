"""One of every sampler, and random numbers that are all there are instead of some."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import sampling

P = [0.125, 0.25, 0.5, 0.125]  # eighths: eight equally likely numbers are enough to enumerate a draw
N = len(P)
Make = Callable[..., Any]


def adaptive(**kwargs: Any) -> sampling.AdaptiveImportanceSampler:
    """Five samples, one not seen yet and one of norm 0: norms 1, 2, 0, 1 and their mean 1, in fifths."""
    sampler = sampling.AdaptiveImportanceSampler(5, 2, uniform_share=0.5, **kwargs)
    sampler.update(torch.tensor([3, 0, 1, 2]), torch.tensor([1.0, 1.0, 2.0, 0.0]))
    return sampler


SAMPLERS: dict[str, Make] = {  # keyword: num_batches
    "single": lambda num_batches, **kwargs: sampling.ImportanceSampler(
        P, num_samples=num_batches * kwargs.get("num_replicas", 1), **kwargs
    ),
    "with_replacement": lambda **kwargs: sampling.ImportanceBatchSampler(P, batch_size=2, **kwargs),
    "tau_nice": lambda **kwargs: sampling.TauNiceBatchSampler(5, 4, **kwargs),
    "independent": lambda **kwargs: sampling.IndependentBatchSampler([0.25, 0.5, 1.0, 0.75], **kwargs),
    "sparse": lambda **kwargs: sampling.IndependentBatchSampler([0.25, 0.25, 0.5], **kwargs),  # mostly small, often empty
    "adaptive": adaptive,
}
every_sampler = pytest.mark.parametrize("make", list(SAMPLERS.values()), ids=list(SAMPLERS))


def grid(steps: int, place: float = 0.5) -> list[float]:
    """The middles of equal parts of [0, 1), or their left ends, which belong to them."""
    return [(k + place) / steps for k in range(steps)]


OUTCOMES: dict[str, list[Any]] = {  # equally likely random numbers of one draw, all of them
    "single": grid(8),
    "with_replacement": list(product(grid(8, 0.0), repeat=2)),
    "tau_nice": list(product(range(5), range(4), range(3), range(2))),
    "independent": list(product(grid(4), repeat=4)),
    "sparse": list(product(grid(4), repeat=3)),
    "adaptive": list(product(product(grid(2), grid(5)), repeat=2)),
}


def all_draws(name: str, monkeypatch: pytest.MonkeyPatch, num_replicas: int = 1) -> list[list[list[Any]]]:
    """For each outcome the batches of all ranks."""
    outcomes = OUTCOMES[name]
    if name == "single" and num_replicas > 1:
        outcomes = list(product(outcomes, repeat=num_replicas))
    samplers = [SAMPLERS[name](num_batches=len(outcomes), num_replicas=num_replicas, rank=rank) for rank in range(num_replicas)]
    return [list(ranks) for ranks in zip(*(_drawn(sampler, outcomes, monkeypatch) for sampler in samplers), strict=True)]


def _drawn(sampler: Any, outcomes: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    endless = cycle(outcomes)

    def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if isinstance(sampler, sampling.ImportanceSampler):  # many draws at once
            return torch.tensor([next(endless) for _ in range(shape[0])], dtype=dtype).reshape(shape)
        return torch.tensor(next(endless), dtype=dtype).reshape(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, generator, dtype, device: numbers(shape, dtype))
        patch.setattr(torch, "randint", lambda high, shape, generator: numbers(shape, torch.int64))
        return [batch if isinstance(batch, list) else [batch] for batch in sampler]


def pairs(batches: Iterable[Any]) -> list[list[tuple[int, float]]]:
    """Indices with their weights, to compare."""
    return [[(int(i), i.weight) for i in (batch if isinstance(batch, list) else [batch])] for batch in batches]
