"""Runs with noise in every gradient: of heavy tails, or of differential privacy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import sam_kernels
from sam_kernels.cli.train.data import load
from sam_kernels.cli.train.model import small_cnn
from sam_kernels.cli.train.optimizers import BASES
from sam_kernels.per_sample import GradNorms

__all__ = ["CLIP", "DATA", "QUARTILES", "SAMPLE_CLIP", "Method", "Noise", "Oracle", "one_run", "stable"]

DATA = "digits"
NORMALIZATION = "group"  # BatchNorm has no gradient of one sample, which privacy needs
CLIP = 1.0  # of the descent gradient with additive noise, as heavy tails need it (arXiv 1912.03194)
SAMPLE_CLIP = 4.0  # C, of each sample's gradient with privacy
QUARTILES = {2.0: 0.953873, 1.5: 0.968933, 1.2: 0.981537}  # upper ones, by the index of stability, of what `stable` returns


@dataclass(frozen=True)
class Noise:
    """``alpha``: index of stability of additive noise, whose upper quartile is ``size``; None: the Gaussian noise of differential
    privacy, of standard deviation ``size`` SAMPLE_CLIP / batch."""

    title: str
    alpha: float | None
    size: float
    splits_privacy: bool = False  # methods of two passes have √2 times the noise, so that a step has the cost of one pass


@dataclass(frozen=True)
class Method:
    """``lambd`` None: SGD. ``beta``: in standard deviations of the batch's norms, as ``RWSAM(beta_scale="std")``."""

    title: str
    lambd: float | None = 1.0
    beta: float = 0.0


def stable(like: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """Symmetric α-stable numbers of scale 1 in the shape of ``like``, by Chambers, Mallows and Stuck (1976). α = 2: variance 2."""
    angle = math.pi * (torch.rand(like.shape, generator=generator, dtype=torch.float64) - 0.5)
    waiting = torch.empty(like.shape, dtype=torch.float64).exponential_(generator=generator)
    tail = (((1 - alpha) * angle).cos() / waiting) ** ((1 - alpha) / alpha)
    return (alpha * angle).sin() / angle.cos() ** (1 / alpha) * tail


class Oracle:
    """Gradients of a batch as an optimizer sees them: weighted by sample, clipped by sample where they are private, with noise."""

    def __init__(self, model: nn.Module, noise: Noise, *, passes: int) -> None:
        self._model, self._noise, self._engine = model, noise, GradNorms(model)
        self._size = noise.size * (math.sqrt(passes) if noise.splits_privacy else 1.0)

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator, *, beta: float = 0.0) -> None:
        """Sets ``.grad``. With ``beta`` samples have the weights of RW-SAM."""
        self._model.zero_grad()
        is_private = self._noise.alpha is None
        largest = 1 / len(labels)  # weight of a sample
        if is_private or beta:
            with self._engine:
                losses = F.cross_entropy(self._model(images), labels, reduction="none")
            norms = self._engine(losses).detach()
            weights = weights_of(norms, beta)
            largest = weights.max().item()
            self._engine.weighted_grads_(weights * (SAMPLE_CLIP / norms).clamp(max=1.0) if is_private else weights)
        else:
            F.cross_entropy(self._model(images), labels).backward()
        for param in self._model.parameters():
            assert param.grad is not None
            param.grad += self._drawn(param, largest, generator)

    def _drawn(self, param: Tensor, largest: float, generator: torch.Generator) -> Tensor:
        """``largest``: weight p of a sample, which adds at most p SAMPLE_CLIP to a private gradient."""
        if self._noise.alpha is None:
            return self._size * SAMPLE_CLIP * largest * torch.randn(param.shape, generator=generator)
        return (self._size / QUARTILES[self._noise.alpha] * stable(param, self._noise.alpha, generator)).to(param.dtype)


def weights_of(norms: Tensor, beta: float) -> Tensor:  # (B,) -> (B,)
    """softmax(beta (n - mean n) / std n)."""
    if not beta:
        return torch.full_like(norms, 1 / len(norms))
    wide = norms.double()
    scaled = (wide - wide.mean()) / wide.std(correction=0).clamp_min(1e-5 * wide.mean())
    return sam_kernels.functional.sharpness_weights(scaled, beta=beta).to(norms.dtype)


def one_run(
    noise: dict[str, Any], method: dict[str, Any], rho: float, epochs: int, batch_size: int, seed: int, held_out: bool
) -> dict[str, Any]:
    """Accuracy in % after the last epoch, on held-out training images or the test images, and how many steps were skipped."""
    how, what, base = Method(**method), Noise(**noise), BASES["sgd"]
    data = load(DATA)
    data = data.held_out() if held_out else data
    torch.manual_seed(seed)
    model = small_cnn(data.train_images.shape[-1], normalization=NORMALIZATION)
    options: dict[str, Any] = {"lr": base.lr, "weight_decay": base.weight_decay, **base.options}
    clip = None if what.alpha is None else CLIP
    if how.lambd is None:
        optimizer: Any = torch.optim.SGD(model.parameters(), **options)
    else:
        optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, rho=rho, lambd=how.lambd, max_grad_norm=clip, **options)
    oracle = Oracle(model, what, passes=1 if how.lambd is None else 2)
    step = _sgd_step if how.lambd is None else _sam_step
    batches, *noises = (torch.Generator().manual_seed(3 * seed + k) for k in range(3))  # the descent's noise is the same for all methods
    per_epoch = len(data.train_labels) // batch_size
    schedule = CosineAnnealingLR(optimizer, T_max=epochs * per_epoch)
    orders = (torch.randperm(len(data.train_labels), generator=batches)[: per_epoch * batch_size] for _ in range(epochs))
    for chosen in chain.from_iterable(order.split(batch_size) for order in orders):
        step(optimizer, oracle, (data.train_images[chosen], data.train_labels[chosen]), noises, how.beta, clip)
        schedule.step()
    with torch.no_grad():
        right = (model(data.test_images).argmax(1) == data.test_labels).double().mean().item()
    return {"accuracy": 100 * right, "skipped": 0 if how.lambd is None else optimizer.skipped_steps}


def _sgd_step(
    optimizer: Any, oracle: Oracle, batch: tuple[Tensor, Tensor], noises: list[torch.Generator], beta: float, clip: float | None
) -> None:
    oracle(*batch, noises[1])
    if clip is not None:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()


def _sam_step(
    optimizer: Any, oracle: Oracle, batch: tuple[Tensor, Tensor], noises: list[torch.Generator], beta: float, clip: float | None
) -> None:
    oracle(*batch, noises[0], beta=beta)
    optimizer.first_step(zero_grad=True)
    oracle(*batch, noises[1])
    optimizer.second_step()
