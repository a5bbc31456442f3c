"""E‖∇f_I‖ and tr V, what normalised and unnormalised m-SAM regularise, over m and during training. arXiv 2509.18001.

Fixed before the runs: METHODS, BUDGET, SIZES; nothing is tuned. Few seeds: this describes, it decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
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
from sam_kernels.cli.train.data import Digits, load
from sam_kernels.cli.train.model import small_cnn
from sam_kernels.cli.train.optimizers import BASES
from sam_kernels.per_sample import GradNorms

__all__ = ["BUDGET", "EXPERIMENT", "METHODS", "SIZES", "bound", "enumerated", "norms_of", "trained"]

DATA = "digits"
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


METHODS = (Method("SGD", 0.0), Method("SAM", 0.1), Method("m-SAM, m = 8", 0.1, micro_batches=8))
BUDGET = Budget(batch_size=64, epochs=(0, 1, 2, 4, 6, 8, 10), seeds=5)
QUICK = Budget(batch_size=64, epochs=(0, 1), seeds=2)


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
    """E‖∇f_I‖ for every size, ‖∇f‖, and tr V of the samples."""
    norms = {m: norms_of(model, images, labels, m) for m in SIZES}
    whole = norms_of(model, images, labels, len(images))
    variance = monitors.gradient_variance(norms[1], whole)
    return {
        **{str(m): monitors.expected_grad_norm(each)[0].item() for m, each in norms.items()},
        "norm": whole.item(),
        "variance": variance.item(),
    }


def trained(method: dict[str, Any], budget: dict[str, Any], seed: int) -> dict[str, Any]:
    """``found``: what :func:`measured` gives after each of the budget's epochs. Its images are the same in every run."""
    one, data, base = Method(**method), load(DATA), BASES["sgd"]
    epochs, size = list(budget["epochs"]), budget["batch_size"]
    seen = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))[:SEEN]
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
    budget = QUICK if context.quick else BUDGET
    problem = Problem()
    gradients = problem.gradients(problem.start.clone().requires_grad_()).detach()
    whole, squares = gradients.mean(0).square().sum().item(), gradients.square().sum(1).mean().item()
    rows: list[dict[str, Any]] = [{"where": "eight samples", "method": name} for name in ("E‖∇f_I‖", "√E‖∇f_I‖²")]
    points: list[dict[str, Any]] = []
    for m in range(1, problem.count + 1):
        pair = enumerated(problem, m), bound(whole, squares - whole, m, problem.count)
        for row, value in zip(rows, pair, strict=True):
            row[str(m)] = [cut(value), None]
        points.append({"where": "eight samples", "method": "", "epoch": None, "m": m, "norm": cut(pair[0]), "error": None, "bound": cut(pair[1])})
    for row in rows:
        row["variance"] = [cut(squares - whole), None]
    jobs = [{"method": asdict(method), "budget": asdict(budget), "seed": seed} for method in METHODS for seed in range(budget.seeds)]
    runs = context.map(trained, jobs, DATA)
    for k, method in enumerate(METHODS):
        own = [run["found"] for run in runs[k * budget.seeds : (k + 1) * budget.seeds]]
        for at, epoch in enumerate(budget.epochs):
            found = {key: mean_of([run[at][key] for run in own]) for key in (*map(str, SIZES), "norm", "variance")}
            if epoch == budget.epochs[-1] or (epoch == 0 and k == 0):  # all start alike
                rows.append({"where": f"digits, epoch {epoch}", "method": method.title if epoch else "at the start", **found})
            for m in SIZES:
                expected, error = found[str(m)]
                limit = bound(found["norm"][0] ** 2, found["variance"][0], m, SEEN)
                common = {"where": DATA, "method": method.title, "epoch": epoch, "m": m}
                points.append(common | {"norm": expected, "error": error, "bound": cut(limit), "variance": found["variance"][0]})
    for row in rows:
        for m in (1, 2, 4, 8, *SIZES):
            row.setdefault(str(m), None)
    settings = {"data": DATA, "seen": SEEN, "methods": [asdict(method) for method in METHODS], **asdict(budget), "lr": BASES["sgd"].lr}
    settings["epochs"] = list(budget.epochs)
    return Measured(settings, rows, [{"variance": None} | point for point in points])


def mean_of(values: list[float]) -> list[float]:
    """Mean and standard error."""
    return [cut(float(np.mean(values))), cut(float(np.std(values, ddof=1) / math.sqrt(len(values))), 2)]


def draw(measured: Measured) -> Figure:
    figure = Figure(figsize=(9.4, 3.5))
    axes = figure.subplots(1, 3)
    small = [point for point in measured.points if point["where"] == "eight samples"]
    sizes = [point["m"] for point in small]
    axes[0].plot(sizes, [point["norm"] for point in small], "o-", color="#1f6f8b", markersize=4, label="E‖∇f_I‖")
    axes[0].plot(sizes, [point["bound"] for point in small], ":", color="#444444", label="√E‖∇f_I‖²")
    axes[0].set(xlabel="m", ylim=(0, None))
    axes[0].set_title("eight samples, every I", fontsize=9)
    last = max(point["epoch"] for point in measured.points if point["where"] == DATA)
    for method, color, marker in zip(METHODS, ("#777777", "#1f6f8b", "#b05f3c"), "os^", strict=True):
        own = [point for point in measured.points if point["where"] == DATA and point["method"] == method.title]
        ends = [point for point in own if point["epoch"] == last]
        bars = {"yerr": [2 * point["error"] for point in ends], "capsize": 2}
        axes[1].errorbar(
            [point["m"] for point in ends],
            [point["norm"] for point in ends],
            **bars,
            color=color,
            marker=marker,
            markersize=4,
            linewidth=1,
            label=method.title,
        )
        ones = [point for point in own if point["m"] == 1]
        epochs, traces = [point["epoch"] for point in ones], [point["variance"] for point in ones]
        axes[2].plot(epochs, traces, color=color, marker=marker, markersize=4, linewidth=1, label=method.title)
    axes[1].set(xscale="log", yscale="log", xlabel="m")
    axes[1].set_title(f"digits, after {last} epochs: E‖∇f_I‖", fontsize=9)
    axes[2].set(yscale="log", xlabel="epoch")
    axes[2].set_title("digits: tr V", fontsize=9)
    for axis in axes:
        axis.legend(fontsize=7.5, frameon=False)
    return tune_axes(figure)


def _shown(pair: list[float | None]) -> str:
    mean, error = pair
    return f"{mean:.3g}" if error is None else f"{mean:.3g} ± {error:.1g}"


EXPERIMENT = Experiment(
    "What grows as m falls",
    (
        Column("where", "where"),
        Column("method", "method"),
        *(Column(str(m), f"m = {m}", _shown) for m in (1, 2, 4, 8, 16, 64, 256)),
        Column("variance", "tr V", _shown),
    ),
    measure,
    draw,
)
