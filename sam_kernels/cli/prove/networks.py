"""Networks on digits: trained by SGD or SAM, turned to rotated digits, with noise on their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import sam_kernels
from sam_kernels.cli.prove.claims import Jobs, Measured, bar, difference
from sam_kernels.cli.train.data import Digits, flip_labels, load
from sam_kernels.cli.train.model import small_cnn
from sam_kernels.cli.train.optimizers import BASES

__all__ = [
    "DRAWS",
    "LEARNT",
    "batches_of",
    "disturbed",
    "fine_tune",
    "forgetting",
    "late_phase",
    "late_start",
    "one_network",
    "train",
    "weight_noise",
]

LEARNT, MOST_STEPS = 75.0, 2000  # % of rotated test images, at which fine-tuning ends; steps after which it is given up
DRAWS = 5  # of the noise, for each network
SIGMA = 0.5  # of the noise, over a tensor's root mean square
FINE_TUNING = (0.05, 0.9)  # learning rate and momentum: those of the training. Slower ones forget less, whoever trained
NOISE = 0.4  # share of wrong labels
METHODS = {"SGD": (0.0, 1.0), "SAM, ρ = 0.1": (0.1, 1.0), "SAM, ρ = 0.2": (0.2, 1.0), "last 20 % only": (0.2, 0.2)}  # ρ, share of the steps


def forgetting(quick: bool, jobs: Jobs) -> Measured:
    """Networks that have learnt digits learn rotated ones until LEARNT % of these are right: accuracy on upright digits then."""
    scores, settings = _scores(quick, jobs, "kept", ("SGD", "SAM, ρ = 0.1", "SAM, ρ = 0.2"))
    effect, error = difference(scores["SAM, ρ = 0.2"], scores["SGD"])
    return Measured(
        effect, error, [bar(title, values) for title, values in scores.items()], {**settings, "learnt": LEARNT, "fine_tuning": FINE_TUNING}
    )


def weight_noise(quick: bool, jobs: Jobs) -> Measured:
    """Test accuracy with normal noise of SIGMA times a tensor's root mean square on every weight."""
    scores, settings = _scores(quick, jobs, "disturbed", ("SGD", "SAM, ρ = 0.1", "SAM, ρ = 0.2"))
    effect, error = difference(scores["SAM, ρ = 0.2"], scores["SGD"])
    return Measured(effect, error, [bar(title, values) for title, values in scores.items()], {**settings, "sigma": SIGMA, "draws": DRAWS})


def late_phase(quick: bool, jobs: Jobs) -> Measured:
    """Wrong labels: the last fifth of the steps by SAM, the others by SGD (arXiv 2410.10373), over SGD."""
    scores, settings = _scores(quick, jobs, "wrong", ("SGD", "SAM, ρ = 0.2", "last 20 % only"))
    effect, error = difference(scores["last 20 % only"], scores["SGD"])
    return Measured(effect, error, [bar(title, values) for title, values in scores.items()], {**settings, "noise": NOISE})


def _scores(quick: bool, jobs: Jobs, key: str, titles: tuple[str, ...]) -> tuple[dict[str, list[float]], dict[str, Any]]:
    size, seeds = {"epochs": 20, "batch_size": 64}, 4 if quick else 6
    titles = tuple(title for title in titles if not (quick and title == "SAM, ρ = 0.1"))
    kinds = [{"rho": METHODS[title][0], "share": METHODS[title][1], "noise": NOISE if key == "wrong" else 0.0} for title in titles]
    found = jobs(one_network, [{**kind, **size, "seed": seed} for kind in kinds for seed in range(seeds)])
    name = "accuracy" if key == "wrong" else key
    scores = {title: [run[name] for run in found[k * seeds : (k + 1) * seeds]] for k, title in enumerate(titles)}
    return scores, {"data": "digits", **size, "seeds": seeds}


def one_network(rho: float, share: float, noise: float, seed: int, epochs: int, batch_size: int) -> dict[str, float]:
    """Accuracies in % of one network: ``accuracy`` on the test images; with right labels ``disturbed``, and ``kept`` after fine-tuning."""
    data = _data()
    model = train(rho, share, flip_labels(data.train_labels, noise, seed), data.train_images, seed, epochs, batch_size)

    def accuracy(network: nn.Module, images: Tensor = data.test_images) -> float:
        with torch.no_grad():
            return float(100 * (network(images).argmax(1) == data.test_labels).double().mean())

    found = {"accuracy": accuracy(model)}
    if noise:
        return found
    found["disturbed"] = sum(accuracy(each) for each in disturbed(model, SIGMA, seed)) / DRAWS
    tuned, (lr, momentum) = copy.deepcopy(model), FINE_TUNING
    rotated, to_learn = (images.rot90(1, (2, 3)) for images in (data.test_images, data.train_images))
    optimizer = torch.optim.SGD(tuned.parameters(), lr=lr, momentum=momentum)
    batches = batches_of(len(to_learn), batch_size, seed)
    fine_tune(tuned, optimizer, to_learn, data.train_labels, batches, partial(accuracy, tuned, rotated))
    return found | {"kept": accuracy(tuned)}


@cache
def _data() -> Digits:
    return load("digits")


def train(rho: float, share: float, labels: Tensor, images: Tensor, seed: int, epochs: int, batch_size: int) -> nn.Module:
    """Initial weights and batches depend on ``seed`` alone. GroupNorm: running statistics would be a second thing that forgets."""
    torch.manual_seed(seed)
    model, base = small_cnn(images.shape[-1], normalization="group"), BASES["sgd"]
    steps = epochs * (len(labels) // batch_size)
    radius = sam_kernels.schedules.Tail(rho, late_start(share, steps))  # with rho = 0 every step is SGD's
    optimizer = sam_kernels.SAM(
        model.parameters(), torch.optim.SGD, rho=radius, model=model, lr=base.lr, weight_decay=base.weight_decay, **base.options
    )
    schedule = CosineAnnealingLR(optimizer, T_max=steps)
    batches = batches_of(len(labels), batch_size, seed)
    for _ in range(steps):
        batch = next(batches)
        optimizer.step(_closure(model, optimizer, images[batch], labels[batch]))
        schedule.step()
    return model


def late_start(share: float, steps: int) -> int:
    """The number of steps before the last ``share`` of them."""
    return steps - round(share * steps)


def fine_tune(
    model: nn.Module,
    optimizer: Any,  # whose step takes a closure that returns a tensor
    images: Tensor,
    labels: Tensor,
    batches: Iterator[Tensor],
    learnt: Callable[[], float],
) -> int:
    """Trains ``model`` until ``learnt()``, which is looked at before each step, is at least LEARNT. Returns the steps that it took.

    Raises: RuntimeError where MOST_STEPS are not enough.
    """
    for step in range(MOST_STEPS):
        if learnt() >= LEARNT:
            return step
        batch = next(batches)
        optimizer.step(_closure(model, optimizer, images[batch], labels[batch]))
    raise RuntimeError(f"fine-tuning has not reached {LEARNT:g} % after {MOST_STEPS} steps")


def disturbed(model: nn.Module, sigma: float, seed: int) -> Iterator[nn.Module]:
    """DRAWS times ``model`` with noise on its weights, the parameters of two or more dimensions: w + sigma rms(w) z, z standard normal.

    z depends on ``seed``, the draw and the parameter: networks of one seed are disturbed by the same z. The weights are put back after
    the last draw.
    """
    weights = [param.data for param in model.parameters() if param.dim() > 1]
    olds = [torch.empty_like(weight) for weight in weights]
    for draw in range(DRAWS):
        for i, (weight, old) in enumerate(zip(weights, olds, strict=True)):
            scale = sigma * weight.square().mean().sqrt().item()
            number = (seed * DRAWS + draw) * len(weights) + i  # of its own: z is a function of the seed and the place in the list
            sam_kernels.functional.random_perturb_([weight], [old], seed=number, scale=scale, distribution="normal")
        yield model
        sam_kernels.functional.restore_(weights, olds)


def _closure(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own is untyped
        return loss

    return closure


def batches_of(samples: int, size: int, seed: int) -> Iterator[Tensor]:
    """Without end; of each epoch a last, shorter batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.split(torch.randperm(samples, generator=generator)[: samples // size * size], size)
