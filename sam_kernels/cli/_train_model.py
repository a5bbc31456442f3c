"""A small convolutional network with BatchNorm, whose running statistics a second pass must not touch."""

from __future__ import annotations

from torch import nn

__all__ = ["small_cnn"]


def small_cnn(side: int, *, width: int = 16, hidden: int = 128, classes: int = 10) -> nn.Sequential:
    """Maps (n, 1, side, side) to (n, classes). Convolutions have stride 2: on a CPU they are nearly all of the time."""
    positions = ((side + 3) // 4) ** 2
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(2 * width * positions, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, classes),
    )
