"""Runs of the map of RW-SAM: which methods, on which networks, labels and batches, and how each one's radius and β are chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_kernels.cli.train.data import Digits, load
from sam_kernels.cli.train.optimizers import BASES, Settings
from sam_kernels.cli.train.plan import Plan
from sam_kernels.cli.train.run import Run, run
from sam_kernels.per_sample import GradNorms

__all__ = [
    "DATA",
    "IN_TIME",
    "METHODS",
    "SCENES",
    "Budget",
    "Job",
    "Measured",
    "Method",
    "Scene",
    "costs_of",
    "covariance",
    "runs_of_scene",
]

DATA = "digits"
CAP = 2.0  # medians
IN_TIME = "the best of RW-SAM, in SAM's time"


@dataclass(frozen=True)
class Scene:
    """A network (``normalization``), the share of wrong labels, and the batch. Networks without BatchNorm: it confounds small m."""

    normalization: str
    noise: float
    batch_size: int = 256


@dataclass(frozen=True)
class Method:
    """``name``: of ``train``. With ``betas``, of the norms' standard deviation, that of RWSAM."""

    title: str
    name: str
    betas: tuple[float, ...] = ()
    norms: str = "exact"
    norm_cap: float | None = None
    batch_sizes: tuple[int, ...] = (64, 256)  # where it is measured


SCENES = (
    *(Scene("group", noise) for noise in (0.0, 0.4, 0.6, 0.8)),
    Scene("none", 0.4),
    Scene("group", 0.4, 64),
)
FOR, AGAINST = (0.5, 1.5), (-0.5, -1.5)
METHODS = (
    Method("SGD", "sgd"),
    Method("SAM", "sam"),
    Method("m-SAM, m = 64", "msam:64", batch_sizes=(256,)),
    Method("m-SAM, m = 16", "msam:16"),
    Method("RW-SAM, β > 0", "rwsam", FOR),
    Method("RW-SAM, β < 0", "rwsam", AGAINST),
    Method("RW-SAM, β > 0, finite differences", "rwsam", FOR, norms="finite_difference"),
    Method("RW-SAM, β < 0, finite differences", "rwsam", AGAINST, norms="finite_difference"),
    Method("RW-SAM, β > 0, norms cut", "rwsam", FOR, norm_cap=CAP),
)


@dataclass(frozen=True)
class Budget:
    epochs: int
    radii: tuple[float, ...]
    tuning: int  # seeds, on held-out training images
    evaluation: int  # other seeds, on the test images


@dataclass(frozen=True)
class Job:
    """One run."""

    scene: Scene
    method: Method
    rho: float
    beta: float
    epochs: int
    seed: int
    held_out: bool

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Job:
        """From ``asdict``, or JSON of it."""
        method = {key: tuple(value) if isinstance(value, list) else value for key, value in fields["method"].items()}
        return cls(**{**fields} | {"scene": Scene(**fields["scene"]), "method": Method(**method)})


@dataclass(frozen=True)
class Measured:
    """What came of a method with the radius and the β that were chosen for it: of each seed of the evaluation."""

    method: str
    rho: float | None
    beta: float | None
    epochs: int
    accuracy: Any  # (seeds,) %, after the last epoch
    variance: Any  # (seeds,) trace of the covariance of one sample's gradient at the end
    mean_square: Any  # (seeds,) ‖∇f‖² there


def measured(**fields: Any) -> dict[str, float]:
    """Test accuracy in % after the last epoch, and tr V and ‖∇f‖² of the labels trained on."""
    job, found = Job.of(fields), dict[str, float]()
    images = _data(job).train_images
    one = run_of(job, lambda model, labels: found.update(covariance(model, images, labels)))
    return {"accuracy": 100 * one.test_accuracy[-1], **found}


def run_of(job: Job, finished: Callable[[nn.Module, Tensor], None] = lambda model, labels: None) -> Run:
    method, base = job.method, BASES["sgd"]
    weights: dict[str, Any] = {"beta": job.beta, "beta_scale": "std", "norms": method.norms, "norm_cap": method.norm_cap}
    settings = Settings("sgd", base.lr, base.weight_decay, job.rho, 1.0, **weights)
    plan = Plan(job.epochs, job.scene.batch_size, job.scene.noise, job.scene.normalization)
    return run(method.name, job.seed, _data(job), settings, plan, finished=finished)


def _data(job: Job) -> Digits:
    data = load(DATA)
    return data.held_out() if job.held_out else data


def covariance(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """tr V = mean ‖∇f_i‖² - ‖∇f‖²."""
    engine = GradNorms(model)
    with engine:
        losses = F.cross_entropy(model(images), labels, reduction="none")
    squares = engine(losses).double().square().mean()
    model.zero_grad()
    engine.weighted_grads_(torch.full_like(losses.detach(), 1 / len(losses)))
    total = torch.stack([param.grad.double().square().sum() for param in model.parameters() if param.grad is not None]).sum()
    model.zero_grad()
    return {"variance": (squares - total).item(), "mean_square": total.item()}


def runs_of_scene(
    scene: Scene, budget: Budget, runs: Callable[[Iterable[Job]], Iterable[dict[str, float]]], costs: Mapping[str, float]
) -> dict[str, Measured]:
    """Every method's runs, with the radius and the β of the best accuracy on held-out images; and of the method of RW-SAM that is best
    there, with as many epochs as take the time of SAM's. ``costs``: of a step, over SAM's."""
    methods = [method for method in METHODS if scene.batch_size in method.batch_sizes]
    tried = [(method, *pair) for method in methods for pair in options_of(method, budget)]
    jobs = [Job(scene, *each, budget.epochs, seed, held_out=True) for each in tried for seed in range(budget.tuning)]
    scores = np.array([found["accuracy"] for found in runs(jobs)]).reshape(len(tried), budget.tuning).mean(1)
    order = np.argsort(-scores, kind="stable")  # the best first
    chosen = {method.title: (*next(tried[i] for i in order if tried[i][0] is method), budget.epochs) for method in methods}
    reweighted = next(tried[i] for i in order if tried[i][0].betas)
    chosen[IN_TIME] = (*reweighted, max(1, round(budget.epochs / costs[reweighted[0].title])))
    seeds = range(budget.tuning, budget.tuning + budget.evaluation)
    found = iter(list(runs(Job(scene, *each, seed, held_out=False) for each in chosen.values() for seed in seeds)))
    measured = {}
    for title, (method, rho, beta, epochs) in chosen.items():
        rows = [next(found) for _ in seeds]
        values = {key: np.array([row[key] for row in rows]) for key in ("accuracy", "variance", "mean_square")}
        options = {"rho": None if method.name == "sgd" else rho, "beta": beta if method.betas else None}
        measured[title] = Measured(method.title, **options, epochs=epochs, **values)
    return measured


def costs_of(scene: Scene, epochs: int) -> dict[str, float]:
    """Medians of a step's time over SAM's in the same round, of the methods of RW-SAM. In this process, which should be alone."""
    kinds = {"SAM": Job(scene, METHODS[1], 0.1, 0.0, epochs, 0, held_out=True)}
    kinds |= {method.title: Job(scene, method, 0.1, method.betas[0], epochs, 0, held_out=True) for method in METHODS if method.betas}
    rounds = [{title: run_of(job).median_seconds_per_step for title, job in kinds.items()} for _ in range(3)]
    return {title: float(np.median([each[title] / each["SAM"] for each in rounds])) for title in kinds}


def options_of(method: Method, budget: Budget) -> Iterator[tuple[float, float]]:
    """Radii and β that are tried."""
    return product(budget.radii if method.name != "sgd" else (0.0,), method.betas or (0.0,))
