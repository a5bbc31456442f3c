"""``python -m sam_kernels validate``: every operation on every backend of this machine against the float64 reference."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from sam_kernels._dispatch import BACKENDS, available, reason_missing
from sam_kernels.cli.fuzzing import MOST_FAILURES, run_fuzz
from sam_kernels.cli.output import console_for, to_json
from sam_kernels.validation.options import OPERATIONS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from sam_kernels.validation.rows import ValidationRow

__all__ = ["validate"]

_COLUMNS = f"{'cases':>6}  {'result':<6}  {'error, ulp':>10}  {'bound, ulp':>10}  {'relative':>9}  in case"


@click.command()
@click.option(
    "--quick",
    is_flag=True,
    help="Check fewer cases, in less than 20 seconds: not every case with every set of options, and few large lists.",
)
@click.option(
    "--fuzz",
    type=click.IntRange(min=1),
    metavar="N",
    help="Check N calls with random tensors and options instead of the table. A failure prints the command that repeats it; after "
    f"{MOST_FAILURES} failed calls the command stops.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random inputs.")
@click.option("--backend", "backends", multiple=True, type=click.Choice(BACKENDS), help="Check only this backend; may be repeated.")
@click.option("--op", "ops", multiple=True, type=click.Choice(OPERATIONS), help="Check only this operation; may be repeated.")
@click.option("--device", default="cpu", show_default=True, help="Device that runs the operations, for example cpu or cuda:1.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON to stdout, and all else to stderr.")
def validate(quick: bool, fuzz: int | None, seed: int, backends: tuple[str, ...], ops: tuple[str, ...], device: str, as_json: bool) -> None:
    """Check every operation on every backend against the float64 reference.

    The bound of each element is derived from the roundings that lead to it. A row shows the element that used most of its bound: its
    error and its bound in ulp of the type it is stored in, and the error relative to the larger of the result and the number it was
    computed from.

    Exit status: 0 if all elements are within their bounds, 1 if one is not, 2 for a wrong option, 130 after Ctrl-C.
    """
    import torch

    from sam_kernels.cli.execution import require_backend, require_device, threads
    from sam_kernels.validation.backends import AUTOMATIC

    torch_device = require_device(device)
    if quick and fuzz is not None:
        raise click.UsageError("--quick shortens the table, which --fuzz replaces; give one of them.")
    for name in backends:
        require_backend(name, torch_device)
    chosen = backends or (*available(torch_device.type), *([] if torch_device.type == "cpu" else [AUTOMATIC]))
    console = console_for(as_json=as_json)
    report: dict[str, Any] = {"torch": torch.__version__, "device": device, "seed": seed}
    with threads(1):  # thousands of small calls: waking threads would cost more than it saves
        if fuzz is not None:
            restricted = [f"--backend={name}" for name in backends] + [f"--op={op}" for op in ops]
            restricted += [] if device == "cpu" else [f"--device={device}"]
            report |= run_fuzz(fuzz, seed, chosen, ops or OPERATIONS, device, console, restricted=restricted)
            passed = not report["findings"]
        else:
            rows = list(_shown_rows(chosen, ops or OPERATIONS, seed, device, console, quick=quick))
            _print_summary(rows, torch_device.type, console)
            report |= {"quick": quick, "rows": [asdict(row) for row in rows]}
            passed = all(row.passed for row in rows)
    if as_json:
        click.echo(to_json(report))
    if not passed:
        sys.exit(1)


def _shown_rows(
    backends: Sequence[str], ops: Sequence[str], seed: int, device: str, console: Console, *, quick: bool
) -> Iterator[ValidationRow]:
    """Yield the rows, each printed as soon as it is measured. On a terminal a bar stands below the last one."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.text import Text

    from sam_kernels.validation.rows import count_rows, validate_rows

    widths = (max(9, *map(len, ops)), max(7, *map(len, backends)), 8)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=count_rows(backends, ops, device=device))
        header = (f"{name:<{width}}" for name, width in zip(("operation", "backend", "dtype"), widths, strict=True))
        console.print(Text(f"{'  '.join(header)}  {_COLUMNS}", style="bold"), no_wrap=True, overflow="ellipsis")
        for row in validate_rows(backends, ops, seed=seed, device=device, quick=quick):
            progress.update(task, description=row.op, advance=1)
            console.print(_line(row, widths), no_wrap=True, overflow="ellipsis")
            yield row


def _line(row: ValidationRow, widths: Sequence[int]) -> Text:
    from rich.text import Text

    names = (f"{name:<{width}}" for name, width in zip((row.op, row.backend, row.dtype), widths, strict=True))
    line = Text(f"{'  '.join(names)}  {row.cases:>6}  ")
    line.append(f"{'pass' if row.passed else 'FAIL':<6}", style="green" if row.passed else "red")
    return line.append(f"  {row.error_ulp:>10.3g}  {row.bound_ulp:>10.3g}  {row.relative_error:>9.2g}  {row.case} {row.option}")


def _print_summary(rows: Sequence[ValidationRow], device_type: str, console: Console) -> None:
    for name in BACKENDS:
        if (reason := reason_missing(name, device_type)) is not None:
            console.print(f"{name}: not checked, {reason}", markup=False, highlight=False, soft_wrap=True)
    failures = [row for row in rows if not row.passed]
    for row in failures:
        console.print(f"FAIL {row.op} {row.backend} {row.dtype}: {row.worst}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{sum(row.cases for row in rows)} checks, {len(failures)} of {len(rows)} rows failed", highlight=False)
