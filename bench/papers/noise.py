"""Noise in every gradient, of heavy tails or of differential privacy: what λ and β do then.

Sources: Unified SAM, arXiv 2503.02225; RW-SAM, arXiv 2509.18001; heavy tails, arXiv 1901.06053 and 1912.03194; DP-SGD, arXiv 1607.00133.
Fixed before the runs: everything below, and CLIP and SAMPLE_CLIP in ``noise_runs.py``. Sizes of the noise were set after a look at SGD
on held-out images (one seed), so that it loses something at each. The radius 0.003 took the place of 0.1 after a first look, in which
nearly every method took the smallest there was, 0.03.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.papers.context import Context
from bench.papers.experiment import Column, Experiment, Measured, cut, signed, tune_axes
from bench.papers.noise_runs import CLIP, DATA, SAMPLE_CLIP, Method, Noise, one_run
from sam_kernels.cli.train.optimizers import BASES

__all__ = ["EXPERIMENT", "METHODS", "NOISES", "SAM", "SGD"]

QUARTILE, SIGMA = 0.005, 2.0
NOISES = (
    Noise("Gaussian", 2.0, QUARTILE),
    Noise("stable, α = 1.5", 1.5, QUARTILE),
    Noise("stable, α = 1.2", 1.2, QUARTILE),
    Noise("private, equal noise", None, SIGMA),
    Noise("private, equal cost", None, SIGMA, splits_privacy=True),
)
SGD, SAM = "SGD", "SAM, λ = 1"
METHODS = (
    Method(SGD, None),
    Method(SAM),
    Method("λ = 0.5", 0.5),
    Method("λ = 0", 0.0),
    Method("β = −1.5", beta=-1.5),
    Method("β = −0.5", beta=-0.5),
    Method("β = 0.5", beta=0.5),
    Method("β = 1.5", beta=1.5),
)
RADII = (0.003, 0.03, 0.3)
EPOCHS, BATCH_SIZE, TUNING, EVALUATION = 8, 256, 2, 10  # seeds on held-out training images; other seeds, on the test images


def measure(context: Context) -> Measured:
    quick = context.quick
    noises, methods = (NOISES[1:5:2], METHODS[:4:3] + METHODS[1:8:6]) if quick else (NOISES, METHODS)
    radii, epochs, tuning, evaluation = (RADII[1:2], 1, 1, 2) if quick else (RADII, EPOCHS, TUNING, EVALUATION)
    size = {"epochs": epochs, "batch_size": BATCH_SIZE}
    rows: list[dict[str, Any]] = []
    for noise in noises:
        kinds = {
            (method.title, rho): {"noise": asdict(noise), "method": asdict(method), "rho": rho} | size
            for method in methods
            for rho in radii
        }
        tuned = [key for key in kinds if key[0] != SGD]
        jobs = [kinds[key] | {"seed": seed, "held_out": True} for key in tuned for seed in range(tuning)]
        found = context.map(one_run, jobs, f"{noise.title}: radii")
        means = np.array([each["accuracy"] for each in found]).reshape(len(tuned), tuning).mean(1)
        scores = dict(zip(tuned, means, strict=True)) | {(SGD, radii[0]): 0.0}
        best = {method.title: max((key for key in scores if key[0] == method.title), key=scores.__getitem__) for method in methods}
        seeds = range(tuning, tuning + evaluation)
        jobs = [kinds[best[method.title]] | {"seed": seed, "held_out": False} for method in methods for seed in seeds]
        found = context.map(one_run, jobs, noise.title)
        values = {key: np.array([each[key] for each in found]).reshape(len(methods), evaluation) for key in ("accuracy", "skipped")}
        rows += rows_of(noise.title, methods, dict(best.values()), values["accuracy"], values["skipped"])
    base = BASES["sgd"]
    settings: dict[str, Any] = {"data": DATA, "lr": base.lr, "weight_decay": base.weight_decay, **base.options, **size}
    settings |= {"quartile": QUARTILE, "sigma": SIGMA, "clip": CLIP, "sample_clip": SAMPLE_CLIP, "radii": list(radii)}
    return Measured(settings | {"tuning": tuning, "evaluation": evaluation}, rows, rows)


def rows_of(
    noise: str,
    methods: Sequence[Method],
    radii: dict[str, float],
    accuracy: Any,  # (methods, seeds) %
    skipped: Any,  # (methods, seeds) steps
) -> list[dict[str, Any]]:
    """Differences are taken seed by seed."""
    rows, of = [], {method.title: accuracy[k] for k, method in enumerate(methods)}
    for k, method in enumerate(methods):
        row = {"noise": noise, "method": method.title, "rho": None if method.title == SGD else radii[method.title]}
        row |= {"accuracy": cut(of[method.title].mean(), 4), "skipped": int(skipped[k].sum())}
        for name, other in (("sam", SAM), ("sgd", SGD)):
            over = of[method.title] - of[other]
            is_own = method.title == other
            row[f"over_{name}"] = None if is_own else cut(over.mean(), 3)
            row[f"errors_{name}"] = None if is_own else cut(2 * over.std(ddof=1) / math.sqrt(len(over)), 2)
        rows.append(row)
    return rows


def draw(measured: Measured) -> Figure:
    noises = list(dict.fromkeys(row["noise"] for row in measured.rows))
    titles = list(dict.fromkeys(row["method"] for row in measured.rows if row["method"] != SAM))
    figure = Figure(figsize=(10.0, 3.4))
    axes = np.atleast_1d(figure.subplots(1, len(noises), sharex=True, sharey=True))
    for axis, noise in zip(axes, noises, strict=True):
        rows = {row["method"]: row for row in measured.rows if row["noise"] == noise}
        for k, title in enumerate(titles):
            over, errors = rows[title]["over_sam"], rows[title]["errors_sam"]
            color = "#777777" if abs(over) < errors or over == 0 else "#2c7a4b" if over > 0 else "#b0413e"
            axis.errorbar(over, k, xerr=errors, fmt="o", color=color, markersize=4, capsize=2)
        axis.axvline(0, color="#bbbbbb", linewidth=0.8)
        axis.set_title(f"{noise}\nSAM: {rows[SAM]['accuracy']:.1f} %", fontsize=8)
        axis.set_yticks(range(len(titles)), titles, fontsize=8)
    axes[0].invert_yaxis()
    axes[len(axes) // 2].set_xlabel("test accuracy over SAM's with λ = 1, points; bars: two standard errors", fontsize=8)
    return tune_axes(figure)


def _errors(value: float) -> str:
    return f"{value:.2f}"


EXPERIMENT = Experiment(
    "Noisy gradients: heavy tails and privacy",
    (
        Column("noise", "noise"),
        Column("method", "method"),
        Column("rho", "ρ", lambda value: f"{value:g}"),
        Column("accuracy", "test accuracy, %", lambda value: f"{value:.2f}"),
        Column("over_sam", "over SAM, λ = 1", signed),
        Column("errors_sam", "± 2 errors", _errors),
        Column("over_sgd", "over SGD", signed),
        Column("errors_sgd", "± 2 errors", _errors),
        Column("skipped", "skipped steps"),
    ),
    measure,
    draw,
)
