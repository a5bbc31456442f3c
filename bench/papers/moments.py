"""Mean and second moments of steps that are affine in x, and of their SDEs: closed forms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import expm
from torch import Tensor

from bench.linear_models import Floats

__all__ = ["affine", "of_diffusion", "of_steps"]


def affine(steps: Callable[[Tensor], Tensor], like: Tensor) -> Floats:
    """(C, d + 1, d + 1): K_c with x - x⁺ = (K_c z)[:d] at learning rate 1 and z = (x, 1), out of the steps at d + 1 points.

    ``like``: (d,), any point. Raises ValueError where the step there is not what K_c gives.
    """
    d = len(like)
    constant = steps(like.new_zeros(d)).numpy()  # (C, d)
    columns = [steps(row).numpy() - constant for row in like.new_ones(d).diag()]
    found = np.zeros((len(constant), d + 1, d + 1))
    found[:, :d, :d], found[:, :d, d] = np.stack(columns, -1), constant
    at = np.append(like.numpy(), 1.0)
    if not np.allclose((found @ at)[:, :d], steps(like).numpy(), rtol=1e-12, atol=1e-12):
        raise ValueError("affine: these steps are not affine in x")
    return found


def of_steps(k: Floats, eta: float, count: int, start: Floats) -> Floats:
    """E z z' (d + 1, d + 1) after ``count`` steps z ← (1 - η K_c) z from z = (start, 1), c drawn anew each time."""
    move = np.eye(k.shape[1]) - eta * k
    second = np.mean([np.kron(each, each) for each in move], axis=0)
    return _applied(np.linalg.matrix_power(second, count), start)


def of_diffusion(drift: Floats, k: Floats, eta: float, time: float, start: Floats) -> Floats:
    """E Z Z' of dZ = drift Z dt + √(η Σ(Z)) dW, Σ(z) the covariance of K_c z: ``drift`` (d + 1, d + 1), with a last row of zeros.

    E ZZ' follows dP/dt = A P + P A' + η E (K_c - K) P (K_c - K)', which is linear, as Σ is a quadratic function of z.
    """
    identity, deviations = np.eye(len(drift)), k - k.mean(0)
    noise = np.mean([np.kron(each, each) for each in deviations], axis=0)
    return _applied(expm(time * (np.kron(drift, identity) + np.kron(identity, drift) + eta * noise)), start)


def _applied(moves: Floats, start: Floats) -> Floats:
    z = np.append(start, 1.0)
    moved: Floats = (moves @ np.outer(z, z).ravel()).reshape(len(z), len(z))
    return moved
