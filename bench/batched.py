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

__all__ = ["EPS", "Schedule", "Steps", "deviation", "trajectories"]

Schedule: TypeAlias = Floats | float | Callable[[int], Floats | float]  # of t = 1, 2, …; broadcast to (streams, runs)
EPS = 1e-12  # the optimizer's own, added to the norm


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
    """How far, of these runs (stream, run), each point of :func:`trajectories` is from that of :class:`sam_kernels.UnifiedSAM` around
    ``torch.optim.SGD`` with gradients by autograd: the largest |difference| / max(1, ‖x‖) of all coordinates and steps."""
    shape = start.shape[:2]
    points = [np.stack([x[run] for run in runs]) for x in trajectories(models, start, draws, steps)]
    worst = 0.0
    for k, (stream, run) in enumerate(runs):
        x = torch.from_numpy(start[stream, run].copy()).requires_grad_()
        optimizer = sam_kernels.UnifiedSAM([x], torch.optim.SGD, lr=1.0)
        for t, (draw, point) in enumerate(zip(draws, points, strict=True), 1):
            rho, lambd, gamma = (np.broadcast_to(value, shape)[stream, run].item() for value in steps.at(t))
            optimizer.param_groups[0].update(rho=rho, lambd=lambd, lr=gamma)
            batch = models.batch(draw)

            def closure(x: Any = x, batch: Any = batch, stream: int = stream) -> Any:
                x.grad = None
                loss = models.objective(x, stream, batch)
                loss.backward()
                return loss

            optimizer.step(closure)
            theirs = x.detach().numpy()
            worst = max(worst, float(np.abs(point[k] - theirs).max() / max(1.0, float(np.linalg.norm(theirs)))))
    return worst
