"""``train``: optimizers side by side on real handwritten digits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click
import torch
from rich.console import Console

from sam_kernels import _dispatch
from sam_kernels.cli.train import options as check
from sam_kernels.cli.train.comparison import compare
from sam_kernels.cli.train.data import DATA_SETS, load
from sam_kernels.cli.train.family import NUMBERED
from sam_kernels.cli.train.model import NORMALIZATIONS
from sam_kernels.cli.train.optimizers import BASES, NORMS, SHARPNESS_AWARE, Settings, options_of
from sam_kernels.cli.train.plot import save_curves
from sam_kernels.cli.train.report import to_json
from sam_kernels.cli.train.run import Plan
from sam_kernels.cli.train.summary import summarise
from sam_kernels.cli.train.table import tables

__all__ = ["train"]


@click.command(context_settings={"show_default": True})
@click.option("--data", type=click.Choice(list(DATA_SETS)), default="mnist5k", help="; ".join(f"{k}: {v}" for k, v in DATA_SETS.items()))
@click.option(
    "--optimizers",
    metavar="NAME,...",
    show_default="the base, sam, usam, unified",
    help=f"Of: the base's own name (sgd or adamw), {', '.join(SHARPNESS_AWARE)}. msam:8 is msam with micro-batches of 8, rwsam:2 is "
    f"rwsam with beta 2, and so are {', '.join(NUMBERED)}; several are run beside each other.",
)
@click.option("--base", type=click.Choice(list(BASES)), default="sgd", help="The optimizer that the others wrap.")
@click.option(
    "--label-noise",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    callback=check.finite,
    help="Share of training labels to make wrong.",
)
@click.option("--epochs", type=click.IntRange(min=1), default=20)
@click.option("--batch-size", type=click.IntRange(min=2), default=64)
@click.option(
    "--lr",
    type=click.FloatRange(0, min_open=True),
    callback=check.finite,
    show_default="sgd 0.05, adamw 0.002",
    help="At first; a cosine takes it to 0.",
)
@click.option("--weight-decay", type=click.FloatRange(0), callback=check.finite, show_default="sgd 5e-4, adamw 1e-2")
@click.option(
    "--rho", type=click.FloatRange(0), callback=check.finite, show_default="each optimizer's own", help="One radius for all of them."
)
@click.option("--lambd", default="0.5", callback=check.lambd, help="Mix of unified: 1 is SAM, 0 is USAM, 1/t and 1-1/t are schedules.")
@click.option("--normalization", type=click.Choice(NORMALIZATIONS), default=Plan.normalization, help="BatchNorm, or GroupNorm.")
@click.option(
    "--micro-batch-size",
    type=click.IntRange(min=1),
    default=Settings.micro_batch_size,
    help="Samples in each of msam's micro-batches, of which a batch is made up; the whole batch is sam. BatchNorm normalises each "
    "micro-batch by itself: a small one then trains another network, in effect, which --normalization group avoids.",
)
@click.option(
    "--beta",
    type=click.FloatRange(0),
    default=Settings.beta,
    callback=check.finite,
    help="Of rwsam: samples are weighted by softmax(beta * gradient norm), so beta has the unit of 1 / norm: where losses and their "
    "gradients are twice as large, half of it does the same. 0 is sam.",
)
@click.option("--norms", type=click.Choice(NORMS), default=Settings.norms, help="How rwsam finds the norms.")
@click.option("--micro-batch", type=click.IntRange(min=1), default=Settings.micro_batch, help="Samples that share one of rwsam's weights.")
@click.option(
    "--num-directions",
    type=click.IntRange(min=1),
    default=Settings.num_directions,
    help="Random directions of rwsam's norms by finite_difference or jvp: a forward pass each.",
)
@click.option("--held-out", is_flag=True, help="Score on a fifth of the training images, which is not trained on: to choose options by.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, help="Runs of each optimizer, with seeds 0, 1, ...")
@click.option("--backend", type=click.Choice(["auto", *_dispatch.BACKENDS]), default="auto", help="Kernels of the sharpness-aware steps.")
@click.option("--device", default="cpu", help="As torch names it.")
@click.option("--threads", type=click.IntRange(min=1), default=1, help="CPU threads. So small a network gains little from more.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("out"), help="Folder for train.json and train.png.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON to stdout, and all else to stderr.")
def train(
    data: str,
    optimizers: str | None,
    base: str,
    label_noise: float,
    epochs: int,
    batch_size: int,
    lr: float | None,
    weight_decay: float | None,
    rho: float | None,
    lambd: float | str,
    normalization: str,
    micro_batch_size: int,
    beta: float,
    norms: str,
    micro_batch: int,
    num_directions: int,
    held_out: bool,
    seeds: int,
    backend: str,
    device: str,
    threads: int,
    out: Path,
    as_json: bool,
) -> None:
    """Train a small CNN on handwritten digits with each optimizer, and compare.

    All get the same epochs, learning rates, initial weights, labels and batches; a sharpness-aware step computes two gradients, so at equal
    epochs it takes about twice the time. The radius is each optimizer's own, and no radius was chosen by looking at the test set.
    """
    check.check_extra()
    names = check.optimizer_names(optimizers, base)
    torch_device = check.check_device(device)
    check.check_backend(backend, torch_device)
    default = BASES[base]
    settings = Settings(
        base,
        lr or default.lr,
        default.weight_decay if weight_decay is None else weight_decay,
        rho,
        lambd,
        micro_batch_size,
        beta,
        norms,
        micro_batch,
        num_directions,
    )
    plan = Plan(epochs, batch_size, label_noise, normalization)
    check.micro_batches(names, settings, plan)
    console = Console(stderr=as_json)
    out.mkdir(parents=True, exist_ok=True)
    with _threads(threads), _dispatch.use_backend(None if backend == "auto" else backend):
        digits = load(data).to(torch_device)
        if held_out:
            digits = digits.held_out()
        if batch_size > len(digits.train_labels):
            raise click.BadParameter(f"only {len(digits.train_labels)} images to train on.", param_hint="'--batch-size'")
        runs = compare(names, seeds, digits, settings, plan, console)
        config = {
            "data": data,
            **asdict(settings),
            **asdict(plan),
            "held_out": held_out,
            "seeds": seeds,
            "backend": backend,
            "device": device,
            "threads": torch.get_num_threads(),
        }
    summaries = [summarise([run for run in runs if run.optimizer == name], options_of(name, settings)) for name in names]
    noise = f", {label_noise:.0%} of the training labels wrong" if label_noise else ""
    scored = "accuracy on held-out training images" if held_out else "test accuracy"
    network = ", GroupNorm" if normalization == "group" else ""
    title = f"{data}, {base}, {epochs} epochs{network}{noise}: {scored}"
    console.print(tables(summaries, title=title, seeds=seeds))
    save_curves(out / "train.png", runs, title=title)
    report = to_json(config, summaries, runs)
    (out / "train.json").write_text(report + "\n")
    console.print(f"curves: {out / 'train.png'}, everything: {out / 'train.json'}", highlight=False, soft_wrap=True)
    if as_json:
        click.echo(report)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
