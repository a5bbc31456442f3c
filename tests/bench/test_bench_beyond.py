"""The runs beyond accuracy: rounding, noise, fine-tuning, SAM in the last steps, and the share of SAM's gain."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.papers import beyond
from bench.papers.beyond_runs import rounded
from sam_kernels.cli.prove import networks
from sam_kernels.cli.prove.networks import DRAWS, disturbed, fine_tune, late_start, train
from sam_kernels.cli.train.model import small_cnn

pytestmark = pytest.mark.usefixtures("one_thread")


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return small_cnn(8, normalization="group")


def weights_of(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters() if param.dim() > 1]


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_a_rounded_channel_is_at_the_nearest_of_its_levels(bits: int) -> None:
    model = network()
    before, found = weights_of(model), weights_of(rounded(model, bits))
    for old, new in zip(before, found, strict=True):
        for channel, levels in zip(old.flatten(1), new.flatten(1), strict=True):
            step = channel.abs().max() / (2 ** (bits - 1) - 1)
            assert len(levels.unique()) <= 2**bits - 1
            assert (levels - channel).abs().max() <= step / 2 * (1 + 1e-5)
            assert levels.abs().max() == pytest.approx(channel.abs().max().item(), rel=1e-6)
    assert all(torch.equal(old, now) for old, now in zip(before, weights_of(model), strict=True)), "the network itself is left as it is"


def test_noise_is_relative_to_the_weights_and_leaves_them() -> None:
    model, before = network(), weights_of(network())
    draws = [weights_of(each) for each in disturbed(model, 0.3, seed=4)]
    assert len(draws) == DRAWS
    assert all(torch.equal(old, now) for old, now in zip(before, weights_of(model), strict=True)), "weights are put back bit for bit"
    noises = [
        torch.cat([(new - old).flatten() / old.square().mean().sqrt() for new, old in zip(draw, before, strict=True)]) for draw in draws
    ]
    for noise in noises:  # n normals: their root mean square is 0.3 within 0.3 / sqrt(2 n), here five of these
        assert noise.square().mean().sqrt().item() == pytest.approx(0.3, abs=5 * 0.3 / (2 * len(noise)) ** 0.5)
    most = 5 / len(noises[0]) ** 0.5  # correlations of independent normals: 1 / sqrt(n)
    assert np.abs(np.corrcoef(np.stack([*noises]))[~np.eye(DRAWS, dtype=bool)]).max() < most
    size = min(len(each.flatten()) for each in before)
    first = np.stack([((new - old) / old.square().mean().sqrt()).flatten()[:size] for new, old in zip(draws[0], before, strict=True)])
    assert np.abs(np.corrcoef(first)[~np.eye(len(before), dtype=bool)]).max() < 5 / size**0.5, "tensors get noise of their own"


def test_two_networks_of_a_seed_get_the_same_noise() -> None:
    noises = []
    for seed in (0, 1):
        model = network(seed)
        before, after = weights_of(model), weights_of(next(disturbed(model, 1.0, seed=4)))
        noises.append([(new - old) / old.square().mean().sqrt() for new, old in zip(after, before, strict=True)])
    for one, other in zip(*noises, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("share", "passes"), [(1.0, 2 * 20), (0.2, 20 + 4), (0.1, 20 + 2)])
def test_late_sam_is_sgd_before(share: float, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward passes are one a step, and two in the last ones."""
    made, closure = [], networks._closure

    def counted(*arguments: Any) -> Any:
        inner = closure(*arguments)

        def call() -> Tensor:
            made.append(1)
            return inner()

        return call

    monkeypatch.setattr(networks, "_closure", counted)
    images, labels = torch.randn(40, 1, 8, 8), torch.arange(40) % 10
    train(0.1, share, labels, images, seed=0, epochs=5, batch_size=10)
    assert late_start(share, 20) == 20 - (passes - 20)
    assert len(made) == passes
    made.clear()
    train(0.0, 1.0, labels, images, seed=0, epochs=5, batch_size=10)
    assert len(made) == 20  # SGD


def test_fine_tuning_ends_where_enough_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, labels = network(), torch.randn(8, 1, 8, 8), torch.arange(8)
    optimizer, values = torch.optim.SGD(model.parameters(), lr=0.1), iter([0.0, 74.9, 75.0, 80.0])
    before = weights_of(model)
    assert fine_tune(model, optimizer, images, labels, repeat(torch.arange(4)), lambda: next(values)) == 2
    assert not torch.equal(before[0], weights_of(model)[0])
    monkeypatch.setattr(networks, "MOST_STEPS", 3)
    with pytest.raises(RuntimeError, match="has not reached 75 % after 3 steps"):
        fine_tune(model, optimizer, images, labels, repeat(torch.arange(4)), lambda: 0.0)


def test_a_share_needs_a_gain() -> None:
    spread = np.array([-1.0, 1.0, -1.0, 1.0])  # of SAM's gains: a standard error of 0.577
    base = np.array([90.0, 91.0, 92.0, 93.0])

    def row(gain: float) -> dict[str, Any]:
        gains = {"sgd": 0 * spread, "sam_1": spread, "sam_2": gain + spread, "last_20": (gain + spread) / 2, "last_10": 0 * spread}
        return beyond._gains("accuracy", {name: {"accuracy": base + each} for name, each in gains.items()})

    found = row(2.0)
    assert found["sam_2"] == [2.0, pytest.approx(2 * 0.577, abs=1e-2), None]
    assert (found["last_20"][2], found["last_10"][2]) == (0.5, 0.0)
    assert row(1.0)["last_20"] == [0.5, pytest.approx(0.577, abs=1e-2), None]
