"""Runs of what SAM does beyond accuracy: networks trained on digits, then turned to rotated ones, disturbed, or rounded to few bits."""

from __future__ import annotations

import copy
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from sam_kernels.cli.prove.networks import DRAWS, batches_of, disturbed, fine_tune, train
from sam_kernels.cli.train.data import Digits, flip_labels, load

__all__ = ["BITS", "DATA", "FINE_TUNINGS", "SIGMAS", "one_run", "rounded"]

DATA = "digits"
FINE_TUNINGS = {"gentle": (0.01, 0.0), "faster": (0.01, 0.9), "as trained": (0.05, 0.9)}  # SGD's learning rate and momentum
SIGMAS = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the noise, over a tensor's root mean square
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
        batches = batches_of(len(to_learn), batch_size, seed)
        steps = fine_tune(tuned, optimizer, to_learn, data.train_labels, batches, partial(accuracy, tuned, rotated))
        found |= {f"kept_{name}": accuracy(tuned), f"learnt_{name}": accuracy(tuned, rotated), f"steps_{name}": steps}
    return found


@cache
def _data() -> Digits:
    return load(DATA)


def rounded(model: nn.Module, bits: int) -> nn.Module:
    """A copy with each output channel's weights at the nearest of 2^bits - 1 equal steps between minus and plus its largest."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for param in copied.parameters():
            if param.dim() > 1:
                step = param.abs().amax(tuple(range(1, param.dim())), keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
                param.copy_((param / step).round() * step)
    return copied
