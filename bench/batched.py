"""Many runs of Unified SAM at once on linear models: a step of all of them is two products. Checked against the library's own optimizer.

A step of an optimizer over a hundred numbers is nearly all overhead: 10^6 of them would take minutes for each run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

import sam_kernels
from bench.linear_models import Draw, Floats, LinearModels

__all__ = ["EPS", "Schedule", "Steps", "deviation", "times_of", "trajectories"]

Schedule: TypeAlias = Floats | float | Callable[[int], Floats | float]  # of t = 1, 2, …; broadcast to (streams, runs)
EPS = 1e-12  # the optimizer's own, added to the norm


def times_of(steps: int, points: int, first: int = 1) -> list[int]:
    """When to look at a run: 0, and about ``points`` steps from ``first`` to the last one, in geometric progression."""
    return [0, *np.unique(np.geomspace(first, steps, points).round().astype(int)).tolist()]


@dataclass(frozen=True)
class Steps:
    rho: Schedule
    lambd: Schedule
    gamma: Schedule  # the learning rate

    def at(self, t: int) -> tuple[Floats, Floats, Floats]:
        rho, lambd, gamma = (np.asarray(each(t) if callable(each) else each) for each in (self.rho, self.lambd, self.gamma))
        return rho, lambd, gamma


def trajectories(models: LinearModels, start: Floats, draws: Iterable[Draw], steps: Steps) -> Iterator[Floats]:
    """The points (streams, runs, d) after each of the draws, from ``start``. arXiv 2503.02225:
    x⁺ = x - γ ∇f_S(x + ρ (1 - λ + λ / ‖∇f_S(x)‖) ∇f_S(x))."""
    x = start
    for t, draw in enumerate(draws, 1):
        rho, lambd, gamma = steps.at(t)
        batch = models.batch(draw)
        g = models.gradient(x, batch)
        norm = np.sqrt(np.einsum("srd,srd->sr", g, g)) + EPS
        ascent = rho * (1 - lambd + lambd / norm)
        g *= ascent[..., None]
        g += x
        x = x - gamma[..., None] * models.gradient(g, batch)
        yield x


def deviation(models: LinearModels, start: Floats, draws: Sequence[Draw], steps: Steps, runs: Sequence[tuple[int, int]]) -> float:
    """How far, of these runs (stream, run), each step of :func:`trajectories` is from one of :class:`sam_kernels.UnifiedSAM` around
    ``torch.optim.SGD`` with gradients by autograd, from the same point: the largest |difference| of a coordinate, over max(1, ‖x‖) and over
    max(1, 1 / ‖∇f_S(x)‖).

    From the same point, since SAM around a minimum is chaotic: runs that differ by rounding part there. And the direction of a gradient is
    known to the rounding of its terms over its norm.
    """
    shape = start.shape[:2]
    points = [np.stack([x[run] for run in runs]) for x in (start, *trajectories(models, start, draws, steps))]
    worst = 0.0
    for k, (stream, run) in enumerate(runs):
        x = torch.tensor(start[stream, run], requires_grad=True)
        optimizer = sam_kernels.UnifiedSAM([x], torch.optim.SGD, lr=1.0)
        for t, draw in enumerate(draws, 1):
            rho, lambd, gamma = (np.broadcast_to(value, shape)[stream, run].item() for value in steps.at(t))
            optimizer.param_groups[0].update(rho=rho, lambd=lambd, lr=gamma)
            batch = models.batch(draw)
            norms: list[float] = []  # at the point, and at the perturbed one

            def closure(x: Any = x, batch: Any = batch, stream: int = stream, norms: list[float] = norms) -> Any:
                x.grad = None
                loss = models.objective(x, stream, batch)
                loss.backward()
                norms.append(float(x.grad.norm()))
                return loss

            x.data.copy_(torch.from_numpy(points[t - 1][k]))
            optimizer.step(closure)
            far = np.abs(points[t][k] - x.detach().numpy()).max()
            scale = max(1.0, float(np.linalg.norm(points[t][k]))) * max(1.0, 1 / (norms[0] + EPS))
            worst = np.maximum(worst, far / scale)  # NaN stays
    return float(worst)
