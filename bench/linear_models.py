"""Linear models f(x) = Σ_i w φ(a_i'x, b_i) + r ‖x‖² / 2, several of them and many points in each at once, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["LOSSES", "Batch", "Draw", "Floats", "LinearModels", "Loss"]

Floats: TypeAlias = NDArray[np.float64]
# Which samples a step sees and what their gradients are weighted with, (streams, τ) each. None: all, each with the weight it has in f.
Draw: TypeAlias = tuple[NDArray[np.int64], Floats] | None
Batch: TypeAlias = tuple[Floats, Floats, Floats]  # (streams, τ, d), (streams, τ), (streams, τ)


@dataclass(frozen=True)
class Loss:
    """φ(z, b) of a prediction z: for autograd; its derivative in z by hand, for many runs at once; the largest second derivative."""

    value: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Floats, Floats], Floats]
    curvature: float


def _log_slope(z: Floats, b: Floats) -> Floats:
    residual = z - b
    return 2 * residual / (1 + residual * residual)


LOSSES = {
    "squares": Loss(lambda z, b: (z - b) ** 2 / 2, lambda z, b: z - b, 1.0),
    # tanh neither overflows nor needs another library.
    "logistic": Loss(lambda z, b: -torch.nn.functional.logsigmoid(b * z), lambda z, b: -b * (0.5 - 0.5 * np.tanh(0.5 * b * z)), 0.25),
    "log": Loss(lambda z, b: torch.log1p((z - b) ** 2), _log_slope, 2.0),
}


@dataclass
class LinearModels:
    """One model a stream; runs of one stream share the model, and the samples drawn from it."""

    loss: str  # of LOSSES
    a: Floats  # (streams, n, d)
    b: Floats  # (streams, n)
    ridge: float = 0.0  # r, a part of every sample's loss
    weight: float | None = None  # w of a sample in f: 1 / n unless given

    def __post_init__(self) -> None:
        self.streams, self.n, self.d = self.a.shape
        self._all = np.full((self.streams, self.n), 1 / self.n if self.weight is None else self.weight)
        self._each = np.arange(self.streams)[:, None]

    def batch(self, draw: Draw) -> Batch:
        """What a step sees."""
        if draw is None:
            return self.a, self.b, self._all
        rows, weights = draw
        return self.a[self._each, rows], self.b[self._each, rows], weights

    def gradient(self, x: Floats, batch: Batch) -> Floats:
        """(streams, runs, d) at as many points: the weighted sum of the samples' gradients."""
        a, b, weights = batch
        slopes = LOSSES[self.loss].slope(x @ a.swapaxes(1, 2), b[:, None]) * weights[:, None]
        gradient = slopes @ a
        if self.ridge:
            gradient += (self.ridge * weights.sum(1))[:, None, None] * x
        return gradient

    def objective(self, x: Tensor, stream: int, batch: Batch) -> Tensor:
        """() of one point (d,): what the gradients above are those of, for autograd."""
        a, b, weights = (torch.tensor(part[stream]) for part in batch)
        return weights @ LOSSES[self.loss].value(a @ x, b) + self.ridge / 2 * weights.sum() * (x @ x)

    def f(self, x: Floats) -> Floats:
        """(streams, runs) at points (streams, runs, d). A stream at a time: what is in between is (runs, n), and the memory of all of
        them took most of the time."""
        return np.stack([self._f_of(*parts) for parts in zip(x, self.a, self.b, self._all, strict=True)])

    def _f_of(self, x: Floats, a: Floats, b: Floats, weights: Floats) -> Floats:
        losses = LOSSES[self.loss].value(torch.from_numpy(x @ a.T), torch.tensor(b)).numpy()
        losses *= weights
        return np.asarray(losses.sum(-1) + self.ridge / 2 * (weights.sum() * (x * x).sum(-1)))

    def gradient_norms(self, x: Floats) -> Floats:
        """(streams, runs): ‖∇f‖."""
        return np.asarray(np.linalg.norm(self.gradient(x, self.batch(None)), axis=-1))
