"""E‖∇f_I‖ and tr V, what normalised and unnormalised m-SAM regularise, over m and during training. arXiv 2509.18001.

Fixed before the runs: METHODS, BUDGET, SIZES; nothing is tuned. Few seeds: this describes, it decides nothing. Wrong labels were added
after a first look at right ones; the seeds of 5 became 3 to pay for them, and m-SAM's micro-batches of 8 samples 16.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import sam_kernels
from bench.papers.context import Context
from bench.papers.drift import regulariser
from bench.papers.experiment import Column, Experiment, Measured, cut, tune_axes
from bench.papers.small_problems import Problem
from sam_kernels import monitors
from sam_kernels.cli.train.data import Digits, flip_labels, load
from sam_kernels.cli.train.model import small_cnn
from sam_kernels.cli.train.optimizers import BASES
from sam_kernels.per_sample import GradNorms

__all__ = ["BUDGET", "EXPERIMENT", "METHODS", "SIZES", "bound", "enumerated", "norms_of", "trained"]

DATA, EIGHT = "digits", "eight samples"
SEEN = 1280  # training images that gradients are measured on: five micro-batches of 256
SIZES = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class Method:
    """SAM with this radius (0: SGD) and this many micro-batches a batch."""

    title: str
    rho: float
    micro_batches: int = 1


@dataclass(frozen=True)
class Budget:
    batch_size: int
    epochs: tuple[int, ...]  # after which gradients are measured; the last ends the run
    seeds: int


METHODS = (Method("SGD", 0.0), Method("SAM", 0.1), Method("m-SAM, m = 16", 0.1, micro_batches=4))
BUDGET = Budget(batch_size=64, epochs=(0, 1, 2, 4, 6, 8, 10), seeds=3)
QUICK = Budget(batch_size=64, epochs=(0, 1), seeds=2)
NOISES = (0.0, 0.4)  # shares of wrong labels


def enumerated(problem: Problem, m: int) -> float:
    """E‖∇f_I‖ over every I of m samples, at the start."""
    return regulariser(problem, 1.0, m)(problem.start.clone().requires_grad_()).item()


def bound(mean_square: float, variance: float, m: int, population: int) -> float:
    """√E‖∇f_I‖² ≥ E‖∇f_I‖, with E‖∇f_I‖² = ‖∇f‖² + tr V (N - m) / (m (N - 1)) without replacement."""
    return math.sqrt(mean_square + variance * (population - m) / (m * (population - 1)))


def norms_of(model: nn.Module, images: Tensor, labels: Tensor, m: int) -> Tensor:
    """(len(images) / m,) float32: ‖∇f_I‖ of m consecutive samples each."""
    engine = GradNorms(model, micro_batch=m, reduction="mean")
    with engine:
        losses = F.cross_entropy(model(images), labels, reduction="none")
    return engine(losses, keep=False)


def measured(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """E‖∇f_I‖ for every size, ‖∇f‖, tr V of the samples, and their mean loss."""
    norms = {m: norms_of(model, images, labels, m) for m in SIZES}
    whole = norms_of(model, images, labels, len(images))
    variance = monitors.gradient_variance(norms[1], whole)
    return {
        **{str(m): monitors.expected_grad_norm(each)[0].item() for m, each in norms.items()},
        "norm": whole.item(),
        "variance": variance.item(),
        "loss": F.cross_entropy(model(images), labels).item(),
    }


def trained(method: dict[str, Any], budget: dict[str, Any], noise: float, seed: int) -> dict[str, Any]:
    """``found``: what :func:`measured` gives after each of the budget's epochs. Its images are the same in every run."""
    one, data, base = Method(**method), load(DATA), BASES["sgd"]
    epochs, size = list(budget["epochs"]), budget["batch_size"]
    seen = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))[:SEEN]
    data = replace(data, train_labels=flip_labels(data.train_labels, noise, seed))
    torch.manual_seed(seed)
    model = small_cnn(data.train_images.shape[-1], normalization="group")
    options = {"lr": base.lr, "weight_decay": base.weight_decay, **base.options}
    optimizer = sam_kernels.SAM(model.parameters(), base.build, rho=one.rho, **options)
    schedule = CosineAnnealingLR(optimizer, T_max=epochs[-1] * (len(data.train_labels) // size))
    batches, found = torch.Generator().manual_seed(seed), []
    for epoch in range(epochs[-1] + 1):
        if epoch in epochs:
            found.append({"epoch": epoch, **measured(model, data.train_images[seen], data.train_labels[seen])})
        if epoch < epochs[-1]:
            _train(model, optimizer, schedule, data, _batches(data, size, batches), one.micro_batches)
    return {"found": found}


def _batches(data: Digits, size: int, generator: torch.Generator) -> Iterable[Tensor]:
    """Of one epoch; the last, shorter one is left out."""
    count = len(data.train_labels) // size * size
    return torch.randperm(len(data.train_labels), generator=generator)[:count].split(size)


def _train(
    model: nn.Module,
    optimizer: sam_kernels.SAM,
    schedule: CosineAnnealingLR,
    data: Digits,
    batches: Iterable[Tensor],
    micro_batches: int,
) -> None:
    def closure(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own is untyped
        return loss.detach()

    for chosen in batches:
        optimizer.step(closure, batch=(data.train_images[chosen], data.train_labels[chosen]), micro_batches=micro_batches)
        schedule.step()


def measure(context: Context) -> Measured:
    budget, noises = (QUICK, NOISES[1:]) if context.quick else (BUDGET, NOISES)
    rows, points = small_part()
    jobs = [
        {"method": asdict(method), "budget": asdict(budget), "noise": noise, "seed": seed}
        for noise in noises
        for method in METHODS
        for seed in range(budget.seeds)
    ]
    runs = iter(context.map(trained, jobs, DATA))
    for noise in noises:
        for method in METHODS:
            own = [next(runs)["found"] for _ in range(budget.seeds)]
            for at, epoch in enumerate(budget.epochs):
                found = {key: mean_of([run[at][key] for run in own]) for key in (*map(str, SIZES), "norm", "variance", "loss")}
                if epoch == budget.epochs[-1] or (epoch == 0 and method is METHODS[0]):  # all start alike
                    where = f"digits, {noise:.0%} wrong labels, {f'epoch {epoch}' if epoch else 'start'}"
                    rows.append({"where": where, "method": method.title if epoch else None, "noise": noise, "epoch": epoch, **found})
                points += list(points_of(method, noise, epoch, found))
    for row in rows:
        for m in (1, 2, 4, 8, *SIZES):
            row.setdefault(str(m), None)
    settings = {"data": DATA, "seen": SEEN, "methods": [asdict(method) for method in METHODS], **asdict(budget), "lr": BASES["sgd"].lr}
    return Measured(settings | {"epochs": list(budget.epochs), "noises": list(noises)}, rows, points)


def small_part() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and points of the eight samples, by enumeration."""
    problem = Problem()
    gradients = problem.gradients(problem.start.clone().requires_grad_()).detach()
    whole, squares = gradients.mean(0).square().sum().item(), gradients.square().sum(1).mean().item()
    rows: list[dict[str, Any]] = [{"where": f"eight samples, {name}", "method": None, "loss": None} for name in ("E‖∇f_I‖", "√E‖∇f_I‖²")]
    points = []
    for m in range(1, problem.count + 1):
        norm, limit = cut(enumerated(problem, m)), cut(bound(whole, squares - whole, m, problem.count))
        rows[0][str(m)], rows[1][str(m)] = [norm, None], [limit, None]
        points.append({"where": EIGHT, "method": "", "noise": None, "epoch": None, "m": m, "norm": norm, "error": None, "bound": limit})
    for row in rows:
        row["variance"] = [cut(squares - whole), None]
    return rows, [point | {"variance": cut(squares - whole)} for point in points]


def points_of(method: Method, noise: float, epoch: int, found: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    variance, mean_square = found["variance"][0], found["norm"][0] ** 2
    for m in SIZES:
        norm, error = found[str(m)]
        one = {"where": DATA, "method": method.title, "noise": noise, "epoch": epoch, "m": m, "norm": norm, "error": error}
        yield one | {"bound": cut(bound(mean_square, variance, m, SEEN)), "variance": variance}


def mean_of(values: list[float]) -> list[float]:
    """Mean and standard error."""
    return [cut(float(np.mean(values))), cut(float(np.std(values, ddof=1) / math.sqrt(len(values))), 2)]


def draw(measured: Measured) -> Figure:
    digits = [point for point in measured.points if point["where"] == DATA]
    noises = list(dict.fromkeys(point["noise"] for point in digits))
    last = max(point["epoch"] for point in digits)
    figure = Figure(figsize=(3.1 * (1 + len(noises)) + 3.1, 3.3))
    axes = figure.subplots(1, 2 + len(noises))
    small = [point for point in measured.points if point["where"] == EIGHT]
    sizes = [point["m"] for point in small]
    axes[0].plot(sizes, [point["norm"] for point in small], "o-", color="#1f6f8b", markersize=4, label="E‖∇f_I‖")
    axes[0].plot(sizes, [point["bound"] for point in small], ":", color="#444444", label="√E‖∇f_I‖²")
    axes[0].set(xlabel="m", ylim=(0, None))
    axes[0].set_title("eight samples, every I", fontsize=9)
    for method, color, marker in zip(METHODS, ("#777777", "#1f6f8b", "#b05f3c"), "os^", strict=True):
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1}
        for noise, line, axis in zip(noises, ("-", "--"), axes[1:], strict=False):
            own = [point for point in digits if (point["method"], point["noise"]) == (method.title, noise)]
            ends, ones = [point for point in own if point["epoch"] == last], [point for point in own if point["m"] == 1]
            values, errors = [point["norm"] for point in ends], [2 * point["error"] for point in ends]
            axis.errorbar([point["m"] for point in ends], values, yerr=errors, capsize=2, label=method.title, **style)
            label = f"{method.title}, {noise:.0%} wrong"
            axes[-1].plot([point["epoch"] for point in ones], [point["variance"] for point in ones], line, label=label, **style)
    for noise, axis in zip(noises, axes[1:], strict=False):
        axis.set(xscale="log", yscale="log", xlabel="m")
        axis.set_xticks(SIZES, list(map(str, SIZES)))
        lowest, highest = np.log10(axis.get_ylim())
        axis.set_ylim(10 ** np.floor(lowest), 10 ** np.ceil(highest))
        axis.minorticks_off()
        axis.set_title(f"digits, {noise:.0%} wrong labels,\nepoch {last}: E‖∇f_I‖", fontsize=9)
    axes[-1].set(yscale="log", xlabel="epoch")
    axes[-1].set_title("digits: tr V", fontsize=9)
    for axis in axes:
        axis.legend(fontsize=6.5, frameon=False)
    return tune_axes(figure)


def _shown(pair: list[float | None]) -> str:
    mean, error = pair
    return f"{mean:.3g}" if error is None else f"{mean:.3g} ± {error:.2g}"


EXPERIMENT = Experiment(
    "What grows as m falls",
    (
        Column("where", "where"),
        Column("method", "method"),
        *(Column(str(m), f"m = {m}", _shown) for m in (1, 2, 4, 8, 16, 64, 256)),
        Column("variance", "tr V", _shown),
        Column("loss", "loss", _shown),
    ),
    measure,
    draw,
)
