"""The command ``prove`` and the claims that it checks, each with its threshold."""

from __future__ import annotations

import importlib
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

import sam_kernels
from sam_kernels.cli import results as files
from sam_kernels.cli.output import INTERRUPTED, console_for
from sam_kernels.cli.prove.claims import Claim, Jobs, Measured
from sam_kernels.cli.prove.report import Result, draw, markdown, table, to_json
from sam_kernels.cli.train.options import check_extra

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["CLAIMS", "prove"]

PAGE, FIGURE, JSON = "prove.md", "prove.png", "prove.json"


def _measure(module: str, function: str, quick: bool, jobs: Jobs) -> Measured:
    """Call a function of a module beside this one. The module imports torch, which ``prove --help`` does not need."""
    found: Measured = getattr(importlib.import_module(f"sam_kernels.cli.prove.{module}"), function)(quick, jobs)
    return found


CLAIMS = (  # those that are timed first, while nothing else runs
    Claim(
        "speed",
        "On the weights of a ResNet-18 a step of the optimizer is faster than a torch loop",
        1.3,
        "×",
        partial(_measure, "speed", "optimizer_step"),
        is_timed=True,
    ),
    Claim(
        "norms",
        "Every sample's gradient norm is exact, and faster than one by one",
        3.0,
        "×",
        partial(_measure, "speed", "gradient_norms"),
        is_timed=True,
    ),
    Claim(
        "labels",
        "With 40 % wrong labels m-SAM is more accurate than SGD",
        8.0,
        "points",
        partial(_measure, "labels", "wrong_labels"),
    ),
    Claim(
        "forgetting",
        "A network trained by SAM forgets less while it learns something else",
        5.0,
        "points",
        partial(_measure, "networks", "forgetting"),
    ),
    Claim(
        "noise",
        "A network trained by SAM bears noise on its weights better",
        0.4,
        "points",
        partial(_measure, "networks", "weight_noise"),
    ),
    Claim(
        "late phase",
        "SAM in the last fifth of the steps gains over SGD",
        1.0,
        "points",
        partial(_measure, "networks", "late_phase"),
    ),
)


@click.command(context_settings={"show_default": True})
@click.option("--quick", is_flag=True, help="Smaller networks and fewer seeds.")
@click.option(
    "--only", multiple=True, type=click.Choice([claim.name for claim in CLAIMS]), help="Check this claim; may be given several times."
)
@click.option("--processes", type=click.IntRange(min=1), show_default="one for each CPU", help="Processes that train networks.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out"),
    help="Folder for prove.md, prove.png and prove.json.",
)
@click.pass_context
def prove(context: click.Context, quick: bool, only: tuple[str, ...], processes: int | None, out: Path) -> None:
    """Check what SAM and this package are worth, on this machine, in minutes.

    Each claim has a threshold that is fixed in the code. A claim that fails is shown as one that fails, and the exit status is then 1.
    """
    from sam_kernels.cli.prove.pool import Pool

    check_extra()
    files.prepare(out, (PAGE, FIGURE, JSON))
    console, results = console_for(as_json=False), list[Result]()
    interrupted = False
    try:
        with Pool(processes or os.cpu_count() or 1, console) as pool:
            for claim in CLAIMS:
                if only and claim.name not in only:
                    continue
                pool.title = claim.name
                console.print(f"{claim.statement} ...", highlight=False)
                results.append(_checked(claim, quick, pool))
                console.print(f"  {results[-1].verdict}: {results[-1].effect}, needed {results[-1].needed}", highlight=False)
    except KeyboardInterrupt:
        interrupted = True
        console.print("interrupted: what has finished is kept", highlight=False)
    if results:
        _write(results, quick, out, console)
    if interrupted:
        context.exit(INTERRUPTED)
    if any(each.verdict != "holds" for each in results):
        context.exit(1)


def _checked(claim: Claim, quick: bool, jobs: Jobs) -> Result:
    """An exception is a result: the other claims are checked all the same."""
    start = time.monotonic()
    try:
        found = claim.measure(quick, jobs)
    except Exception as error:
        return Result(claim, None, time.monotonic() - start, f"{type(error).__name__}: {error}")
    return Result(claim, found, time.monotonic() - start)


def _write(results: list[Result], quick: bool, out: Path, console: Console) -> None:
    import torch

    machine = {
        "CPU": f"{os.cpu_count()} × {platform.processor() or platform.machine()}",
        "torch": str(torch.__version__),
        "sam_kernels": sam_kernels.__version__,
        "Python": platform.python_version(),
    }
    console.print(table(results))
    writers: dict[str, Callable[[Path], object]] = {
        JSON: lambda path: path.write_text(to_json(results, machine, quick) + "\n", encoding="utf-8"),
        PAGE: lambda path: path.write_text(markdown(results, machine, quick), encoding="utf-8"),
        FIGURE: lambda path: draw(results, path),
    }
    files.save(out, writers)
    console.print(f"report: {out / PAGE}, figure: {out / FIGURE}, everything: {out / JSON}", highlight=False, soft_wrap=True)
