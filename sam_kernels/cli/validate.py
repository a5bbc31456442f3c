"""``python -m sam_kernels validate``: every operation on every backend of this machine against the float64 reference."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import click
import torch
from rich.console import Console
from rich.table import Table

from sam_kernels._dispatch import BACKENDS, available, reason_missing
from sam_kernels.cli.execution import require_backend, require_device, threads
from sam_kernels.validation.backends import AUTOMATIC
from sam_kernels.validation.rows import OPERATIONS, ValidationRow, validate_rows

__all__ = ["validate"]


@click.command()
@click.option("--json", "json_path", type=click.Path(dir_okay=False, allow_dash=True), help="Write the rows as JSON; - for stdout, alone.")
@click.option("--backend", "backends", multiple=True, type=click.Choice(BACKENDS), help="Check only this backend; may be repeated.")
@click.option("--op", "ops", multiple=True, type=click.Choice(OPERATIONS), help="Check only this operation; may be repeated.")
@click.option("--device", default="cpu", show_default=True, help="Device that runs the operations, for example cpu or cuda:1.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random inputs.")
def validate(json_path: str | None, backends: tuple[str, ...], ops: tuple[str, ...], device: str, seed: int) -> None:
    """Check every operation on every backend against the float64 reference.

    The bound of each element is derived from the roundings that lead to it. A row shows the element that used most of its bound. The exit
    code is 1 if any element exceeds its bound.
    """
    torch_device = require_device(device)
    for name in backends:
        require_backend(name, torch_device)
    chosen = backends or (*available(torch_device.type), *([] if torch_device.type == "cpu" else [AUTOMATIC]))
    with threads(1):  # thousands of small calls: waking threads would cost more than it saves
        rows = list(validate_rows(chosen, ops or OPERATIONS, seed=seed, device=device))
    if json_path is not None:
        with click.open_file(json_path, "w") as file:
            json.dump({"torch": torch.__version__, "device": device, "seed": seed, "rows": [asdict(row) for row in rows]}, file, indent=1)
            file.write("\n")
    if json_path != "-":
        _print(rows, torch_device.type)
    if not all(row.passed for row in rows):
        sys.exit(1)


def _print(rows: Sequence[ValidationRow], device_type: str) -> None:
    console = Console()
    console.print(_table(rows))
    for name in BACKENDS:
        if (reason := reason_missing(name, device_type)) is not None:
            console.print(f"{name}: not checked, {reason}", markup=False, highlight=False)
    failures = [row for row in rows if not row.passed]
    for row in failures:
        console.print(f"FAIL {row.op} {row.backend} {row.dtype}: {row.worst}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{sum(row.cases for row in rows)} checks, {len(failures)} of {len(rows)} rows failed", highlight=False)


def _table(rows: Sequence[ValidationRow]) -> Table:
    table = Table("operation", "backend", "dtype", "cases", "worst (ulp)", "bound (ulp)", "in case", "result")
    for row in rows:
        result = "[green]pass[/]" if row.passed else "[red]FAIL[/]"
        where = f"{row.case} {row.option}"
        table.add_row(row.op, row.backend, row.dtype, str(row.cases), f"{row.error_ulp:.3g}", f"{row.bound_ulp:.3g}", where, result)
    return table
