"""The command ``train`` and its options."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sam_kernels._dispatch import BACKENDS, use_backend
from sam_kernels.cli import results
from sam_kernels.cli.output import INTERRUPTED, console_for
from sam_kernels.cli.train import options as check
from sam_kernels.cli.train.optimizers import BASES, BETA_SCALES, MEMBERS, NORMS, NUMBERED, Settings
from sam_kernels.cli.train.plan import DATA_SETS, NORMALIZATIONS, SHARPNESS_IMAGES, Plan

if TYPE_CHECKING:
    from rich.console import Console

    from sam_kernels.cli.train.comparison import Comparison
    from sam_kernels.cli.train.run import Run

__all__ = ["train"]

CURVES, JSON = "train.png", "train.json"


@click.command(context_settings={"show_default": True})
@click.option(
    "--data",
    type=click.Choice(list(DATA_SETS)),
    default="mnist5k",
    help=f"Images to train and to score on. {'; '.join(f'{k}: {v}' for k, v in DATA_SETS.items())}.",
)
@click.option(
    "--optimizers",
    metavar="NAME,...",
    show_default="the base, sam, usam, unified",
    help=f"Names, separated by commas: the base's own name (sgd or adamw), {', '.join(MEMBERS)}. msam:8 is msam with "
    f"micro-batches of 8, rwsam:2 is rwsam with beta 2, likewise {', '.join(NUMBERED)}.",
)
@click.option("--base", type=click.Choice(list(BASES)), default="sgd", help="Base optimizer that the sharpness-aware ones wrap.")
@click.option(
    "--peer",
    is_flag=True,
    help="Run SAM as a plain PyTorch loop too (plain-sam), with the steps of sam up to rounding: compare the time of the rest of a step.",
)
@click.option(
    "--label-noise",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    callback=check.finite,
    help="Share of training labels to make wrong, from 0 to below 1.",
)
@click.option("--epochs", type=click.IntRange(min=1), default=20, help="Passes of each run over the training images.")
@click.option("--batch-size", type=click.IntRange(min=2), default=64, help="Training images in each step.")
@click.option(
    "--lr",
    type=click.FloatRange(0, min_open=True),
    callback=check.finite,
    show_default="sgd 0.05, adamw 0.002",
    help="Learning rate of the first step; a cosine takes it to 0.",
)
@click.option(
    "--weight-decay",
    type=click.FloatRange(0),
    callback=check.finite,
    show_default="sgd 5e-4, adamw 1e-2",
    help="Weight decay of the base optimizer.",
)
@click.option(
    "--rho",
    type=click.FloatRange(0),
    callback=check.finite,
    show_default="each optimizer's own",
    help="Radius of all sharpness-aware optimizers.",
)
@click.option(
    "--lambd",
    default="0.5",
    callback=check.lambd,
    help="Mix of unified: 1 is SAM, 0 is USAM, 1/t and 1-1/t are schedules over the steps t.",
)
@click.option(
    "--normalization",
    type=click.Choice(NORMALIZATIONS),
    default=Plan.normalization,
    help="Normalisation layers of the network: BatchNorm, GroupNorm, or none.",
)
@click.option(
    "--micro-batch-size",
    type=click.IntRange(min=1),
    default=Settings.micro_batch_size,
    help="Samples in each of msam's micro-batches, which together make up a batch; the whole batch is sam. BatchNorm normalises each "
    "micro-batch by itself: a small one then trains another network, in effect, which --normalization group avoids.",
)
@click.option(
    "--beta",
    type=click.FLOAT,
    default=Settings.beta,
    callback=check.finite,
    help="Sharpness of rwsam's weights: samples are weighted by softmax(beta * gradient norm). beta has the unit of 1 / norm: for losses "
    "twice as large, half of it has the same effect. 0 is sam; below 0 short gradients weigh more.",
)
@click.option(
    "--beta-scale",
    type=click.Choice(BETA_SCALES),
    default=Settings.beta_scale,
    help="Unit of rwsam's beta: with std one over the standard deviation of the batch's norms.",
)
@click.option(
    "--norm-cap",
    type=click.FloatRange(0, min_open=True),
    callback=check.finite,
    show_default="none",
    help="Cut rwsam's norms at so many times the batch's median: no wrong label decides alone.",
)
@click.option("--norms", type=click.Choice(NORMS), default=Settings.norms, help="Method by which rwsam computes the gradient norms.")
@click.option("--micro-batch", type=click.IntRange(min=1), default=Settings.micro_batch, help="Samples that share one of rwsam's weights.")
@click.option(
    "--num-directions",
    type=click.IntRange(min=1),
    default=Settings.num_directions,
    help="Random directions of rwsam's norms by finite_difference or jvp: a forward pass each.",
)
@click.option("--held-out", is_flag=True, help="Score on a fifth of the training images, left out of the training. Choose options with it.")
@click.option(
    "--sharpness",
    is_flag=True,
    help="Measure the largest eigenvalue and the trace of the Hessian of the training loss at the end of each run, in evaluation mode, on "
    f"the first {SHARPNESS_IMAGES:,} training images at most.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=1, help="Runs of each optimizer, with seeds 0, 1, ...")
@click.option("--backend", type=click.Choice(["auto", *BACKENDS]), default="auto", help="Backend of the sharpness-aware steps.")
@click.option("--device", default="cpu", help="Device, for example cpu or cuda:1.")
@click.option(
    "--threads",
    "thread_count",
    type=click.IntRange(min=1),
    default=1,
    help="CPU threads. A network this small gains little from more.",
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("out"), help="Folder for the results: train.json and train.png."
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON to stdout, and all else to stderr.")
def train(
    data: str,
    optimizers: str | None,
    base: str,
    peer: bool,
    label_noise: float,
    epochs: int,
    batch_size: int,
    lr: float | None,
    weight_decay: float | None,
    normalization: str,
    held_out: bool,
    sharpness: bool,
    seeds: int,
    backend: str,
    device: str,
    thread_count: int,
    out: Path,
    as_json: bool,
    **settings_as_given: Any,
) -> None:
    """Train a small CNN on handwritten digits with each optimizer, and compare.

    All get the same epochs, learning rates, initial weights, labels and batches; a sharpness-aware step computes two gradients, so at equal
    epochs it takes about twice the time. The radius is each optimizer's own, and no radius was chosen by looking at the test set.

    Ctrl-C keeps the runs that have finished: their tables, curves and JSON are written, and the exit status is 130.
    """
    from sam_kernels.cli.execution import require_backend, require_device, threads
    from sam_kernels.cli.train.comparison import Comparison
    from sam_kernels.cli.train.data import load

    check.check_extra()
    names = check.optimizer_names(optimizers, base)
    if peer:
        names = check.with_peer(names)
    torch_device = require_device(device)
    if backend != "auto":
        require_backend(backend, torch_device)
    decay = BASES[base].weight_decay if weight_decay is None else weight_decay
    settings = Settings(base=base, lr=lr or BASES[base].lr, weight_decay=decay, **settings_as_given)
    plan = Plan(epochs, batch_size, label_noise, normalization)
    check.micro_batches(names, settings, plan)
    comparison = Comparison(
        data,
        names,
        settings,
        plan,
        held_out=held_out,
        sharpness=sharpness,
        seeds=seeds,
        backend=backend,
        device=device,
        threads=thread_count,
    )
    results.prepare(out, (CURVES, JSON))
    console = console_for(as_json=as_json)
    runs: list[Run] = []
    interrupted = False
    try:
        with threads(thread_count), use_backend(None if backend == "auto" else backend):
            digits = load(data).to(torch_device)
            if held_out:
                digits = digits.held_out()
            if batch_size > len(digits.train_labels):
                raise click.BadParameter(f"only {len(digits.train_labels)} images to train on.", param_hint="'--batch-size'")
            runs.extend(comparison.run(digits, console))  # one by one: those that have finished stay
    except KeyboardInterrupt:
        interrupted = True
        console.print(f"interrupted: {len(runs)} of {comparison.planned} runs have finished", highlight=False)
    if runs:
        _publish(comparison, runs, console, out, interrupted=interrupted, as_json=as_json)
    if interrupted:
        sys.exit(INTERRUPTED)


def _publish(comparison: Comparison, runs: list[Run], console: Console, out: Path, *, interrupted: bool, as_json: bool) -> None:
    """Print and write the results of the runs that have finished. Printed first: a full disk loses nothing."""
    from sam_kernels.cli.train.plot import save_curves
    from sam_kernels.cli.train.report import advice, tables, to_json

    console.print(tables(comparison, runs))
    for line in advice(comparison, runs):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    report = to_json(comparison, runs, interrupted=interrupted)
    if as_json:
        click.echo(report)
    writers: dict[str, Callable[[Path], object]] = {
        CURVES: lambda path: save_curves(path, runs, title=comparison.title),
        JSON: lambda path: path.write_text(report + "\n"),
    }
    results.save(out, writers)
    console.print(f"curves: {out / CURVES}, everything: {out / JSON}", highlight=False, soft_wrap=True)
