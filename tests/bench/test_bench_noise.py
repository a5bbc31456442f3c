"""Noise in gradients: its numbers, that gradients without it are the library's, and what a row says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.papers.noise import METHODS, NOISES, SAM, SGD, rows_of
from bench.papers.noise_runs import QUARTILES, SAMPLE_CLIP, Method, Noise, Oracle, one_run, stable
from sam_kernels import RWSAM
from sam_kernels.cli.train.model import small_cnn

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(samples: int = 12) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    model = small_cnn(8, normalization="group")
    return model, torch.randn(samples, 1, 8, 8), torch.randint(0, 10, (samples,))


def grads_of(model: nn.Module) -> list[Tensor]:
    return [param.grad.clone() for param in model.parameters() if param.grad is not None]


@pytest.mark.parametrize("alpha", QUARTILES)
def test_stable_numbers_have_the_quartiles_and_the_tails_of_their_index(alpha: float) -> None:
    n = 400_000
    drawn = stable(torch.empty(n), alpha, generator(3)).numpy()
    lower, median, upper = np.quantile(drawn, (0.25, 0.5, 0.75))
    # Five standard errors of a quantile, √(p (1 - p) / n) / f, with densities f above 0.2 there.
    assert (lower, median, upper) == pytest.approx((-QUARTILES[alpha], 0.0, QUARTILES[alpha]), abs=5 * 0.5 / math.sqrt(n) / 0.2)
    if alpha == 2.0:
        assert drawn.var() == pytest.approx(2.0, abs=5 * 2 * math.sqrt(2 / n))
    else:  # P(|x| > u) falls as u^-alpha
        far, farther = ((np.abs(drawn) > u).mean() for u in (30.0, 90.0))
        assert math.log(far / farther) / math.log(3) == pytest.approx(alpha, abs=0.25)


@pytest.mark.parametrize("beta", [-1.5, 0.5])
def test_without_noise_the_reweighted_gradient_is_the_optimizers(beta: float) -> None:
    model, images, labels = problem()
    Oracle(model, Noise("", 2.0, 0.0), passes=2)(images, labels, generator(), beta=beta)
    found = grads_of(model)
    optimizer = RWSAM(model, torch.optim.SGD, beta=beta, beta_scale="std", lr=0.1)
    with optimizer.recording():
        losses = F.cross_entropy(model(images), labels, reduction="none")
    optimizer.weighted_backward(losses)
    for got, wanted in zip(found, grads_of(model), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)  # float32, sums of a dozen samples in another order


def test_a_private_gradient_is_the_mean_of_clipped_ones() -> None:
    model, images, labels = problem()
    labels[:4] = 3
    with torch.no_grad():
        model[-1].bias[3] = 5.0  # some are clipped, and those that this is right for are not
    Oracle(model, Noise("", None, 0.0), passes=1)(images, labels, generator())
    found, expected, shares = grads_of(model), [torch.zeros_like(param) for param in model.parameters()], []
    for image, label in zip(images, labels, strict=True):
        one = torch.autograd.grad(F.cross_entropy(model(image[None]), label[None]), list(model.parameters()))
        shares.append(min(1.0, SAMPLE_CLIP / math.sqrt(sum(g.square().sum().item() for g in one))))
        expected = [total + shares[-1] * g / len(labels) for total, g in zip(expected, one, strict=True)]
    assert min(shares) < 1.0 == max(shares)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("splits", "passes", "factor"), [(False, 2, 1.0), (True, 1, 1.0), (True, 2, math.sqrt(2))])
@pytest.mark.parametrize("beta", [0.0, 1.5])
def test_private_noise_is_as_large_as_the_largest_weight_asks_for(splits: bool, passes: int, factor: float, beta: float) -> None:
    """Two passes at √2 times the noise cost 2 / (2 · 2σ²), which is one pass at σ."""
    model, images, labels = problem()
    gradients = []
    for size in (0.0, 3.0):
        Oracle(model, Noise("", None, size, splits), passes=passes)(images, labels, generator(5), beta=beta)
        gradients.append(torch.cat([grad.flatten() for grad in grads_of(model)]))
    noise, again = gradients[1] - gradients[0], generator(5)
    unit = torch.cat([torch.randn(param.shape, generator=again).flatten() for param in model.parameters()])
    share = ((noise @ unit) / (unit @ unit)).item() / (3.0 * SAMPLE_CLIP * factor)
    if beta:
        assert 1.2 / len(labels) < share < 1.0
    else:
        assert share == pytest.approx(1 / len(labels), rel=1e-4)
    torch.testing.assert_close(noise, share * 3.0 * SAMPLE_CLIP * factor * unit, rtol=1e-3, atol=1e-5)


def test_a_run_depends_on_its_arguments_alone_and_methods_share_the_descents_noise() -> None:
    size: dict[str, Any] = {"epochs": 1, "batch_size": 256, "seed": 3, "held_out": True}
    noise, sgd = vars(Noise("", 1.5, 0.005)), vars(Method(SGD, None))
    assert one_run(noise, sgd, 0.1, **size) == one_run(noise, sgd, 0.2, **size)
    without_ascent = one_run(noise, vars(Method("", 1.0)), 1e-9, **size)  # the same steps but for rounding
    assert without_ascent["accuracy"] == pytest.approx(one_run(noise, sgd, 0.1, **size)["accuracy"], abs=0.8)
    assert one_run(noise, vars(Method("", 0.0)), 0.3, **size) != without_ascent


def test_differences_are_taken_seed_by_seed() -> None:
    accuracy = np.array([[90.0, 80.0, 70.0], [91.0, 82.0, 73.0], [90.0, 82.0, 74.0]])
    methods = (METHODS[0], METHODS[1], METHODS[3])
    rows = rows_of("x", methods, {SGD: 0.1, SAM: 0.1, "λ = 0": 0.3}, accuracy, np.zeros((3, 3)))
    assert [row["method"] for row in rows] == [SGD, SAM, "λ = 0"]
    assert [row["rho"] for row in rows] == [None, 0.1, 0.3]
    assert [row["over_sam"] for row in rows] == [-2.0, None, 0.0]
    assert [row["over_sgd"] for row in rows] == [None, 2.0, 2.0]
    assert rows[2]["errors_sam"] == pytest.approx(2 / math.sqrt(3), rel=0.05)
    assert rows[2]["errors_sgd"] == pytest.approx(2 * 2 / math.sqrt(3), rel=0.05)


def test_every_noise_is_measured_with_every_mix_and_weight() -> None:
    assert {method.lambd for method in METHODS} == {None, 0.0, 0.5, 1.0}
    assert {method.beta for method in METHODS} == {-1.5, -0.5, 0.0, 0.5, 1.5}
    assert {noise.alpha for noise in NOISES} == {None, *QUARTILES}
    assert len({noise.size for noise in NOISES if noise.alpha}) == 1  # of equal interquartile range
