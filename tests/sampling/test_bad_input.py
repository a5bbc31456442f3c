"""What the samplers refuse, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sam_kernels.sampling import (
    AdaptiveImportanceSampler,
    ImportanceBatchSampler,
    ImportanceSampler,
    IndependentBatchSampler,
    TauNiceBatchSampler,
)

nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize("make", [ImportanceSampler, lambda *args, **kw: ImportanceBatchSampler(*args, **kw, batch_size=2)])
@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (([0.5, 0.0, 0.5],), {}, ValueError, r"probabilities\[1\] must be finite and more than 0.0, got 0.0"),
        (([-0.5, 1.5],), {}, ValueError, r"probabilities\[0\] must be finite and more than 0.0, got -0.5"),
        (([nan, 0.5],), {}, ValueError, r"probabilities\[0\] must be finite and more than 0.0, got nan"),
        (([0.5, 0.6],), {}, ValueError, r"probabilities must sum to 1 within 4.44e-16, got 1.1"),
        ((torch.tensor([0.5, 0.5 + 2**-21]),), {}, ValueError, r"probabilities must sum to 1 within 2.38e-07"),
        (([],), {}, ValueError, r"probabilities must have one dimension and at least one element, got shape \(0,\)"),
        ((torch.ones(2, 2) / 4,), {}, ValueError, r"probabilities must have one dimension"),
        ((torch.ones(1, dtype=torch.int64),), {}, TypeError, "probabilities has dtype torch.int64"),
        (("half",), {}, TypeError, "probabilities must be a floating-point tensor or a sequence of numbers, got 'half'"),
        (([True],), {}, TypeError, "probabilities must be a floating-point tensor or a sequence of numbers, got list"),
        ((), {"lipschitz": [1.0, 0.0]}, ValueError, r"lipschitz\[1\] must be finite and more than 0.0, got 0.0"),
        ((), {"lipschitz": [1.0, -2.0]}, ValueError, r"lipschitz\[1\] must be finite and more than 0.0, got -2.0"),
        ((), {"lipschitz": [inf, 1.0]}, ValueError, r"lipschitz\[0\] must be finite and more than 0.0, got inf"),
        ((), {"lipschitz": [1.0, 1e-320]}, ValueError, r"lipschitz\[1\] is too small: its weight 1 / \(n p_i\) is not finite, p_i being"),
        ((), {"lipschitz": [1e300, 1e-300]}, ValueError, r"lipschitz\[1\] is too small: its weight"),
        (([1e-320, 1.0],), {}, ValueError, r"probabilities\[0\] is too small: its weight 1 / \(n p_i\) is not finite"),
        ((), {}, ValueError, "give either probabilities or lipschitz"),
        (([1.0],), {"lipschitz": [1.0]}, ValueError, "give either probabilities or lipschitz"),
        (([1.0],), {"seed": -1}, ValueError, r"seed must be an integer in \[0, 2\^64\)"),
        (([1.0],), {"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        (([1.0],), {"num_replicas": 0}, ValueError, "num_replicas must be at least 1, got 0"),
        (([1.0],), {"num_replicas": 2, "rank": 2}, ValueError, "rank must be at most 1, got 2"),
    ],
)
def test_probabilities(make: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"Importance(Batch)?Sampler: {message}"):
        make(*args, **kwargs)


def test_sums_that_rounding_explains_are_taken() -> None:
    for n in (3, 10, 1000):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            p = torch.rand(n).add(0.1).to(dtype)
            sampler = ImportanceSampler(p / p.sum())
            assert abs(sampler.probabilities.sum().item() - 1) <= n * 2**-52


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ImportanceSampler([1.0], num_samples=0), ValueError, "ImportanceSampler: num_samples must be at least 1, got 0"),
        (lambda: ImportanceSampler([1.0], num_samples=2.0), TypeError, "ImportanceSampler: num_samples must be an integer, got 2.0"),  # type: ignore[arg-type]
        (lambda: ImportanceSampler([1.0]).draw(-1), ValueError, "ImportanceSampler: num_draws must be at least 0, got -1"),
        (lambda: ImportanceSampler([1.0]).set_epoch(-1), ValueError, "ImportanceSampler: epoch must be at least 0, got -1"),
        (lambda: ImportanceBatchSampler([1.0], batch_size=0), ValueError, "ImportanceBatchSampler: batch_size must be at least 1"),
        (lambda: ImportanceBatchSampler([1.0], batch_size=1, num_batches=0), ValueError, "num_batches must be at least 1, got 0"),
        (
            lambda: ImportanceBatchSampler([1.0], batch_size=3, num_replicas=2, rank=0),
            ValueError,
            "batch_size must be a multiple of num_replicas 2",
        ),
        (
            lambda: TauNiceBatchSampler(4, 2, num_replicas=2),
            ValueError,
            "num_replicas 2 needs rank, as torch.distributed is not initialised",
        ),
        (lambda: TauNiceBatchSampler(5, 6), ValueError, "TauNiceBatchSampler: batch_size must be at most 5, got 6"),
        (lambda: TauNiceBatchSampler(0, 1), ValueError, "TauNiceBatchSampler: data_size must be at least 1, got 0"),
        (lambda: TauNiceBatchSampler(5, True), TypeError, "TauNiceBatchSampler: batch_size must be an integer, got True"),
        (lambda: TauNiceBatchSampler(8, 4, num_replicas=3, rank=0), ValueError, "batch_size must be a multiple of num_replicas 3, got 4"),
        (lambda: IndependentBatchSampler([0.5, 1.25]), ValueError, "IndependentBatchSampler: probabilities must be at most 1, got 1.25"),
        (lambda: IndependentBatchSampler([0.5, 0.0]), ValueError, r"IndependentBatchSampler: probabilities\[1\] must be finite and more"),
        (lambda: IndependentBatchSampler([1e-320, 0.5]), ValueError, r"IndependentBatchSampler: probabilities\[0\] is too small: its"),
        (lambda: IndependentBatchSampler([0.5], num_batches=0), ValueError, "IndependentBatchSampler: num_batches must be at least 1"),
        (lambda: AdaptiveImportanceSampler(5, 2, uniform_share=0.0), ValueError, r"uniform_share must be a finite number in \(0.0, 1.0\]"),
        (lambda: AdaptiveImportanceSampler(5, 2, uniform_share=1.5), ValueError, "AdaptiveImportanceSampler: uniform_share must be"),
        (lambda: AdaptiveImportanceSampler(5, 2, decay=1.0), ValueError, r"AdaptiveImportanceSampler: decay must be .* in \[0.0, 1.0\)"),
        (lambda: AdaptiveImportanceSampler(0, 2), ValueError, "AdaptiveImportanceSampler: data_size must be at least 1, got 0"),
        (lambda: AdaptiveImportanceSampler(5, 2, num_batches=0), ValueError, "AdaptiveImportanceSampler: num_batches must be at least 1"),
    ],
)
def test_sizes_and_shares(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_replicas_of_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for function, result in (("is_initialized", True), ("get_world_size", 4), ("get_rank", 3)):
        monkeypatch.setattr(torch.distributed, function, lambda result=result: result)
    make = lambda **kwargs: TauNiceBatchSampler(8, 4, **kwargs)  # noqa: E731
    assert [(s.num_replicas, s.rank) for s in (make(), make(num_replicas=1), make(num_replicas=2, rank=1))] == [(4, 3), (1, 0), (2, 1)]
    with pytest.raises(ValueError, match="TauNiceBatchSampler: rank must be at most 1, got 3"):
        make(num_replicas=2)
    alone = AdaptiveImportanceSampler(8, 4, num_replicas=1)
    alone.update(torch.tensor([1]), torch.ones(1))  # exchanges nothing
    assert (alone.rank, alone.estimates[1]) == (0, 1)
    with pytest.raises(ValueError, match="AdaptiveImportanceSampler: num_replicas must be 1 or the world size 4, got 2"):
        AdaptiveImportanceSampler(8, 4, num_replicas=2, rank=0)


def test_numpy_s_integers_are_integers() -> None:
    make = lambda n, tau, seed: AdaptiveImportanceSampler(n, tau, seed=seed, num_replicas=tau, rank=tau * 0)  # noqa: E731
    of_numpy, plain = make(np.int64(8), np.int32(2), np.uint64(2**63)), make(8, 2, 2**63)
    for sampler in (of_numpy, plain):
        sampler.set_epoch(type(sampler.seed)(3))
    assert list(of_numpy) == list(plain)
    assert repr(of_numpy.state_dict(np.int8(1))) == repr(plain.state_dict(1))
    assert repr(plain) == "AdaptiveImportanceSampler(steps=4, data_size=8, batch_size=2, seed=9223372036854775808, epoch=3, position=4)"
    assert list(TauNiceBatchSampler(torch.tensor(5), 2)) == list(TauNiceBatchSampler(5, 2))  # type: ignore[arg-type]
    for wrong in (np.True_, torch.tensor(True), torch.tensor(2.0), torch.tensor([2, 2]), np.float64(2), "2"):
        with pytest.raises(TypeError, match="TauNiceBatchSampler: batch_size must be an integer"):
            TauNiceBatchSampler(5, wrong)  # type: ignore[arg-type]
