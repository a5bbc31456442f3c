"""Runs of what SAM does beyond accuracy: networks trained on digits, then turned to rotated ones, disturbed, or rounded to few bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from sam_kernels import SAM, functional
from sam_kernels.cli.train.data import Digits, flip_labels, load
from sam_kernels.cli.train.model import small_cnn
from sam_kernels.cli.train.optimizers import BASES
from sam_kernels.schedules import Tail

__all__ = [
    "BITS",
    "DATA",
    "DRAWS",
    "FINE_TUNINGS",
    "LEARNT",
    "SIGMAS",
    "disturbed",
    "fine_tune",
    "late_start",
    "one_run",
    "rounded",
    "train",
]

DATA = "digits"
FINE_TUNINGS = {"gentle": (0.01, 0.0), "faster": (0.01, 0.9), "as trained": (0.05, 0.9)}  # SGD's learning rate and momentum
LEARNT, MOST_STEPS = 75.0, 2000  # % of rotated test images, at which fine-tuning ends; steps after which it is given up
SIGMAS = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the noise, over a tensor's root mean square
DRAWS = 5  # of the noise, for each network
BITS = (8, 4, 3)


def one_run(rho: float, share: float, noise: float, seed: int, epochs: int, batch_size: int) -> dict[str, Any]:
    """Accuracies in % of one network: on the test images, and with right labels also in the tests of forgetting, noise and rounding.

    Args:
        rho: radius; 0 is SGD.
        share: of the steps, at the end, that are SAM's; the others are SGD's.
        noise: share of wrong training labels.
    """
    data = _data()
    model = train(rho, share, flip_labels(data.train_labels, noise, seed), data.train_images, seed, epochs, batch_size)

    def accuracy(network: nn.Module, images: Tensor = data.test_images) -> float:
        with torch.no_grad():
            return 100 * (network(images).argmax(1) == data.test_labels).double().mean().item()

    found: dict[str, Any] = {"accuracy": accuracy(model)}
    if noise:
        return found
    for bits in BITS:
        found[f"bits_{bits}"] = accuracy(rounded(model, bits))
    for sigma in SIGMAS:
        found[f"sigma_{sigma:g}"] = sum(accuracy(each) for each in disturbed(model, sigma, seed)) / DRAWS
    rotated, to_learn = (images.rot90(1, (2, 3)) for images in (data.test_images, data.train_images))
    for name, (lr, momentum) in FINE_TUNINGS.items():
        tuned = copy.deepcopy(model)
        optimizer = torch.optim.SGD(tuned.parameters(), lr=lr, momentum=momentum)
        batches = _batches(len(to_learn), batch_size, seed)
        steps = fine_tune(tuned, optimizer, to_learn, data.train_labels, batches, partial(accuracy, tuned, rotated))
        found |= {f"kept_{name}": accuracy(tuned), f"learnt_{name}": accuracy(tuned, rotated), f"steps_{name}": steps}
    return found


@cache
def _data() -> Digits:
    return load(DATA)


def train(rho: float, share: float, labels: Tensor, images: Tensor, seed: int, epochs: int, batch_size: int) -> nn.Module:
    """Initial weights and batches depend on ``seed`` alone. GroupNorm: running statistics would be a second thing that forgets."""
    torch.manual_seed(seed)
    model, base = small_cnn(images.shape[-1], normalization="group"), BASES["sgd"]
    steps = epochs * (len(labels) // batch_size)
    radius = Tail(rho, late_start(share, steps))  # with rho = 0 every step is SGD's
    optimizer = SAM(
        model.parameters(), torch.optim.SGD, rho=radius, model=model, lr=base.lr, weight_decay=base.weight_decay, **base.options
    )
    schedule = CosineAnnealingLR(optimizer, T_max=steps)
    batches = _batches(len(labels), batch_size, seed)
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
    optimizer: torch.optim.Optimizer,
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
            functional.random_perturb_([weight], [old], seed=number, scale=scale, distribution="normal")
        yield model
        functional.restore_(weights, olds)


def rounded(model: nn.Module, bits: int) -> nn.Module:
    """A copy with each output channel's weights at the nearest of 2^bits - 1 equal steps between minus and plus its largest."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for param in copied.parameters():
            if param.dim() > 1:
                step = param.abs().amax(tuple(range(1, param.dim())), keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
                param.copy_((param / step).round() * step)
    return copied


def _closure(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    return closure


def _batches(samples: int, size: int, seed: int) -> Iterator[Tensor]:
    """Without end; of each epoch a last, shorter batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(samples, generator=generator)[: samples // size * size].split(size)
