"""Many runs at once: every way of sampling, every λ, several seeds, a step of all of them together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench import batched
from bench.importance.problem import Ridge
from bench.linear_models import Draw, Floats
from sam_kernels import theory
from sam_kernels.sampling import ImportanceSampler

__all__ = ["LAMBDS", "WAYS", "draws", "measure", "rate_of", "steps_of", "trajectories"]

LAMBDS = (0.0, 0.5, 1.0)
# Importance sampling twice: every draw's objective is L_avg-smooth, which allows longer steps than the paper's L_max.
WAYS = {"uniform": "uniform", "importance_l_max": "importance, steps for L_max", "importance": "importance, steps for L_avg"}
BLOCK = 1000  # steps whose samples are drawn at a time


@dataclass
class Steps:
    """What theory says of one way and one λ."""

    rho: float
    gamma: float
    L: float
    C: float


def steps_of(problem: Ridge, way: str, lambd: float) -> Steps:
    sampling = way.partition("_")[0]
    smoothness = problem.smoothness
    A, B = theory.expected_residual(sampling, n=len(smoothness), L=smoothness)
    L = theory.sampled_smoothness(sampling, n=len(smoothness), L=smoothness) if way == sampling else smoothness.max().item()
    rho, gamma = theory.pl_constant_steps(problem.mu, L, A, B, lambd)
    return Steps(rho, gamma, L, theory.residual_constant(A, problem.f_inf, problem.mean_f_i_inf))


def trajectories(problem: Ridge, steps: int, seeds: int) -> Iterator[Floats]:
    """The points x of all runs, (ways, λ, seeds, d), after each of 1, 2, … ``steps`` steps from 0. Runs that differ in λ alone see the
    same samples."""
    theirs = [[steps_of(problem, way, lambd) for lambd in LAMBDS] for way in WAYS for _ in range(seeds)]
    rho, gamma = (np.array([[getattr(each, key) for each in row] for row in theirs]) for key in ("rho", "gamma"))
    samplers = [ImportanceSampler(lipschitz=torch.ones(len(problem.b)) if way == "uniform" else problem.smoothness) for way in WAYS]
    models = problem.models(len(theirs))
    runs = batched.Steps(rho, np.array(LAMBDS), gamma)
    for x in batched.trajectories(models, np.zeros((*rho.shape, models.d)), draws(samplers, seeds, steps), runs):
        yield x.reshape(len(WAYS), seeds, len(LAMBDS), -1).swapaxes(1, 2)


def draws(samplers: Sequence[ImportanceSampler], seeds: int, steps: int, tau: int = 1) -> Iterator[Draw]:
    """``steps`` batches of tau elements for each sampler and seed, (samplers · seeds, tau). Sampler k has the generator seeded with k."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(samplers))]
    for start in range(0, steps, BLOCK):
        drawn = [sampler.draw(BLOCK * seeds * tau, generator) for sampler, generator in zip(samplers, generators, strict=True)]
        shape = (BLOCK, len(samplers) * seeds, tau)
        indices, weights = (np.stack([part[k].numpy().reshape(BLOCK, -1) for part in drawn], 1).reshape(shape) for k in range(2))
        yield from zip(indices[: steps - start], weights / tau, strict=False)


def measure(problem: Ridge, times: list[int], seeds: int, tick: Callable[[int], Any] = lambda t: None) -> list[dict[str, Any]]:
    """One row a way and λ: what theory says, the mean of f - f* over the seeds after each of ``times`` steps, and what comes of it."""
    gaps = [np.full((len(WAYS), len(LAMBDS)), problem.f(torch.zeros_like(problem.minimum)).item() - problem.f_inf)]
    for t, x in enumerate(trajectories(problem, times[-1], seeds), 1):
        if t == times[len(gaps)]:
            gaps.append((problem.f(torch.from_numpy(x)).mean(-1) - problem.f_inf).numpy())
            tick(t)
    curves = np.stack(gaps)  # (times, ways, λ)
    return [
        {"way": way, "lambd": lambd, **_row(problem, lambd, steps_of(problem, way, lambd), curves[:, w, k], np.array(times))}
        for w, way in enumerate(WAYS)
        for k, lambd in enumerate(LAMBDS)
    ]


def _row(problem: Ridge, lambd: float, theirs: Steps, curve: Floats, times: NDArray[np.int64]) -> dict[str, Any]:
    mu, gamma, args = problem.mu, theirs.gamma, (theirs.L, theirs.C, lambd, theirs.rho, theirs.gamma)
    bound = np.array([theory.pl_bound(int(t), curve[0].item(), mu, *args) for t in times])
    # Five times the time in which the bound falls by a factor of e: what is left of the start is below the floor.
    settled = times[-1] >= 5 / (gamma * mu)
    return {
        "rho": theirs.rho,
        "gamma": gamma,
        "L": theirs.L,
        "C": theirs.C,
        "rate_predicted": gamma * mu,
        "rate_measured": rate_of(curve, times),
        "floor_predicted": theory.pl_floor(mu, *args),
        "floor_measured": curve[times >= 0.8 * times[-1]].mean().item() if settled else None,
        "largest_share_of_bound": (curve / bound).max().item(),
        "gap": [float(f"{value:.4g}") for value in curve],
    }


def rate_of(curve: Floats, times: NDArray[np.int64]) -> float:
    """By how much ln(f - f*) falls in a step, from the start until half of it is left (log-linear between points), or to the end."""
    passed = np.flatnonzero(curve <= curve[0] / 2)
    if not len(passed):
        return math.log(curve[0] / curve[-1]) / int(times[-1])
    k = int(passed[0])
    share = math.log(curve[k - 1] / (curve[0] / 2)) / math.log(curve[k - 1] / curve[k])
    return math.log(2) / float(times[k - 1] + share * (times[k] - times[k - 1]))
