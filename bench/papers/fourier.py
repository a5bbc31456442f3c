"""E φ(x_k) of random steps, and E φ(X_T) of a diffusion, for every start of a periodic grid: without Monte Carlo."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse.linalg import expm_multiply

from bench.linear_models import Floats

__all__ = ["Grid", "after_diffusion", "after_steps"]


@dataclass(frozen=True)
class Grid:
    """n × n points of [0, 2π)², n odd. A function of period 2π is its n² values: the trigonometric polynomial through them."""

    n: int

    @property
    def axis(self) -> Floats:  # (n,)
        return 2 * np.pi * np.arange(self.n) / self.n

    @property
    def points(self) -> Floats:  # (n², 2)
        return np.stack(np.meshgrid(self.axis, self.axis, indexing="ij"), -1).reshape(-1, 2)

    def derivatives(self) -> list[Floats]:
        """Two matrices (n², n²): values to values of the derivative along each axis."""
        each = self._modes(self.axis, derivative=True)
        return [np.kron(each, np.eye(self.n)), np.kron(np.eye(self.n), each)]

    def interpolation(self, at: Floats) -> Floats:  # (P, 2) -> (P, n²)
        """Matrix: values on the grid to values at the points."""
        first, second = (self._modes(at[:, axis]) for axis in (0, 1))
        product: Floats = np.einsum("pa,pb->pab", first, second).reshape(len(at), -1)
        return product

    def _modes(self, x: Floats, *, derivative: bool = False) -> Floats:  # (P,) -> (P, n)
        k = np.fft.fftfreq(self.n, 1 / self.n)
        waves = np.exp(1j * np.outer(x, k)) * (1j * k if derivative else 1)
        return (waves @ np.exp(-1j * np.outer(k, self.axis))).real / self.n


def after_steps(grid: Grid, steps: Floats, eta: float, count: int, phi: Floats) -> Floats:
    """(n², F): E φ(x_count) for x_0 at each point, x ← x - η g with g drawn anew from the C rows of ``steps`` (n², C, 2). φ: (n², F).

    By u ← E u(x - η g), count times: exact but for the interpolation of u, which converges exponentially in n.
    """
    move = np.mean([grid.interpolation(grid.points - eta * steps[:, c]) for c in range(steps.shape[1])], axis=0)
    for _ in range(count):
        phi = move @ phi
    return phi


def after_diffusion(grid: Grid, drift: Floats, noise: Floats, time: float, phi: Floats) -> Floats:
    """(n², F): E φ(X_time) of dX = drift dt + √noise dW for X_0 at each point; ``drift`` (n², 2), ``noise`` (n², 2, 2).

    By the backward equation u' = drift·∇u + noise : ∇²u / 2, with the exponential of the operator on the grid.
    """
    d = grid.derivatives()
    generator = sum(drift[:, i, None] * d[i] for i in (0, 1)) + sum(
        noise[:, i, j, None] / 2 * (d[i] @ d[j]) for i in (0, 1) for j in (0, 1)
    )
    after: Floats = expm_multiply(generator * time, phi)
    return after
