"""Three tasks whose runs take seconds on one core, with train sets so small that what is learnt must generalise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.dial import text
from bench.per_sample.models import Transformer
from sam_kernels.cli.train.data import Digits, flip_labels, load
from sam_kernels.cli.train.model import small_cnn

__all__ = ["TASKS", "Problem", "Task", "sample_losses"]

HELD_OUT = 2000  # images to choose ρ on; there are fewer test images
WINDOW = 32  # bytes that the language model sees
SCORED = 1024  # windows that it is scored on
SHAPE = {"dim": 64, "layers": 1, "heads": 4}  # of the transformer


@dataclass
class Problem:
    """A new model, the data to train it on, and its score after training."""

    model: nn.Module
    inputs: Tensor  # (n, …)
    labels: Tensor  # (n,) or (n, T), int64
    score: Callable[[], float]


@dataclass(frozen=True)
class Task:
    title: str
    metric: str
    sign: int  # of a gain: 1 where more is better, -1 where less is
    base: str  # of sam_kernels.cli.train.optimizers.BASES: optimizer, learning rate, weight decay
    rho: float  # where the search for a radius begins
    epochs: int  # of SAM, and of all methods at equal epochs
    batch_size: int
    samples: int  # to train on
    make: Callable[[int, int, bool], Problem]  # seed, samples, and whether scores are of held-out data; otherwise they are of test data
    decimals: int

    def settings(self) -> dict[str, Any]:
        """Everything that a stored run depends on, beside its method, radius, seed and epochs."""
        kept = {key: getattr(self, key) for key in ("metric", "base", "epochs", "batch_size", "samples")}
        return kept | ({"text": text.digest(_sizes(self.samples)), "model": SHAPE} if self.make is _language else {})


def sample_losses(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:  # (B,)
    """Return the mean cross entropy of each sample."""
    losses = F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten(), reduction="none")
    return losses if labels.dim() == 1 else losses.view(labels.shape).mean(1)


@torch.no_grad()
def _evaluate(model: nn.Module, of: Callable[[], float]) -> float:
    model.eval()
    value = of()
    model.train()
    return value


@cache
def _digits() -> Digits:
    return load("mnist5k")


def _images(noise: float, seed: int, samples: int, held_out: bool) -> Problem:
    """The first ``samples`` of the 4,000 training images of ``train``, which are in random order. The next ones are held out."""
    digits = _digits()
    images, labels = (digits.train_images, digits.train_labels) if held_out else (digits.test_images, digits.test_labels)
    first = samples if held_out else 0
    images, labels = images[first : first + HELD_OUT], labels[first : first + HELD_OUT]
    torch.manual_seed(seed)
    model = small_cnn(images.shape[-1])

    def accuracy() -> float:
        return 100 * (model(images).argmax(1) == labels).double().mean().item()

    train_labels = flip_labels(digits.train_labels[:samples], noise, seed)
    return Problem(model, digits.train_images[:samples], train_labels, lambda: _evaluate(model, accuracy))


def _noisy(seed: int, samples: int, held_out: bool) -> Problem:
    return _images(0.4, seed, samples, held_out)


def _clean(seed: int, samples: int, held_out: bool) -> Problem:
    return _images(0.0, seed, samples, held_out)


def _sizes(samples: int) -> dict[str, int]:
    return {name: (samples if name == "train" else SCORED) * WINDOW + 1 for name in text.PARTS}


def _language(seed: int, samples: int, held_out: bool) -> Problem:
    inputs, labels = text.windows("train", samples, WINDOW)
    scored = text.windows("held_out" if held_out else "test", SCORED, WINDOW)
    torch.manual_seed(seed)
    model = Transformer(**SHAPE, tokens=WINDOW, vocabulary=128)

    def bits() -> float:
        return sample_losses(model, *scored).double().mean().item() / math.log(2)

    return Problem(model, inputs, labels, lambda: _evaluate(model, bits))


_IMAGES: dict[str, Any] = {"metric": "test accuracy, %", "sign": 1, "base": "sgd", "rho": 0.4, "batch_size": 64, "decimals": 2}
TASKS = {
    "noisy-labels": Task("40 % wrong labels", epochs=12, samples=512, make=_noisy, **_IMAGES),
    "text": Task(
        "bytes of text",
        metric="test bits per byte",
        sign=-1,
        base="adamw",
        rho=0.4,
        epochs=16,
        batch_size=16,
        samples=256,
        make=_language,
        decimals=3,
    ),
    "clean-labels": Task("clean labels", epochs=12, samples=512, make=_clean, **_IMAGES),
}
