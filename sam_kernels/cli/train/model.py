"""A small convolutional network with BatchNorm, whose running statistics a second pass must not touch, with GroupNorm, or with neither."""

from __future__ import annotations

from torch import nn

__all__ = ["small_cnn"]

GROUPS = 8


def small_cnn(side: int, *, normalization: str = "batch", width: int = 16, hidden: int = 128, classes: int = 10) -> nn.Sequential:
    """Maps (n, 1, side, side) to (n, classes). Convolutions have stride 2: on a CPU they are nearly all of the time.

    ``normalization``: one of ``plan.NORMALIZATIONS``.
    """
    positions = ((side + 3) // 4) ** 2
    bias = normalization == "none"

    def norm(channels: int, batch_norm: type[nn.Module]) -> list[nn.Module]:
        if normalization == "none":
            return []
        return [batch_norm(channels) if normalization == "batch" else nn.GroupNorm(GROUPS, channels)]

    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1, bias=bias),
        *norm(width, nn.BatchNorm2d),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=bias),
        *norm(2 * width, nn.BatchNorm2d),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(2 * width * positions, hidden, bias=bias),
        *norm(hidden, nn.BatchNorm1d),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, classes),
    )
