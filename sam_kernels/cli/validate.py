"""``python -m sam_kernels validate``: every operation on every backend of this machine against the float64 reference."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import click
import torch
from rich.console import Console
from rich.table import Table

from sam_kernels._dispatch import BACKENDS, available, reason_missing
from sam_kernels.validation.cases import DTYPES, MIXED_NARROW
from sam_kernels.validation.check import AUTOMATIC, check, combinations, dtypes_of
from sam_kernels.validation.compare import Worst
from sam_kernels.validation.options import OPTIONS
from sam_kernels.validation.per_sample.cases import PER_SAMPLE_OPTIONS
from sam_kernels.validation.per_sample.cases import combinations as per_sample_combinations
from sam_kernels.validation.per_sample.check import check_per_sample, has_per_sample
from sam_kernels.validation.sharpness.cases import SHARPNESS_DTYPES, SHARPNESS_OPTIONS
from sam_kernels.validation.sharpness.cases import combinations as sharpness_combinations
from sam_kernels.validation.sharpness.check import check_sharpness

__all__ = ["ValidationRow", "validate", "validate_rows"]

OPERATIONS = (*OPTIONS, *PER_SAMPLE_OPTIONS, *SHARPNESS_OPTIONS)


@dataclass
class ValidationRow:
    """One operation on one backend in one dtype."""

    op: str
    backend: str
    dtype: str
    cases: int
    error_ulp: float  # of the element that used most of its bound, in ulp of the type it is stored in
    bound_ulp: float
    passed: bool
    case: str  # where that element is
    option: str
    worst: str  # the same in words: case, keyword set, list, index, element, values


def validate_rows(
    backends: Sequence[str],
    ops: Sequence[str] = OPERATIONS,
    *,
    seed: int = 0,
    dtypes: Sequence[str] = (*DTYPES, MIXED_NARROW),
    device: str = "cpu",
) -> Iterator[ValidationRow]:
    """Rows as they are found, for the dtypes a backend has kernels for. Raises nothing for a wrong result; an operation that raises is a
    failed row."""
    taken = {backend: dtypes_of(backend, device) for backend in backends}
    for op in ops:
        for dtype in dtypes:
            if op in SHARPNESS_OPTIONS:  # all of them have kernels for both
                takers = list(backends) if dtype in SHARPNESS_DTYPES else []
            else:
                takers = [each for each in backends if dtype in taken[each] and (op in OPTIONS or has_per_sample(each, device))]
            if takers:
                yield from _validate_op(op, dtype, takers, seed, device)


def _validate_op(op: str, dtype: str, backends: Sequence[str], seed: int, device: str) -> list[ValidationRow]:
    worst = dict.fromkeys(backends, Worst())
    where = dict.fromkeys(backends, ("", ""))
    count = 0
    combinations_of, check_one = _family(op)
    for case, option in combinations_of(op, dtype):
        count += 1
        for backend, found in _guarded(partial(check_one, op, backends, dtype, case, option, seed, device), backends).items():
            if where[backend] == ("", "") or found.badness() > worst[backend].badness():
                worst[backend], where[backend] = found, (case, option)
    return [_row(op, name, dtype, count, worst[name], *where[name]) for name in backends]


def _family(op: str) -> tuple[Callable[[str, str], Iterator[tuple[str, str]]], Callable[..., dict[str, Worst]]]:
    """The pairs of case and keyword set of an operation, and the check of one."""
    if op in PER_SAMPLE_OPTIONS:
        return per_sample_combinations, check_per_sample
    if op in SHARPNESS_OPTIONS:
        return sharpness_combinations, check_sharpness
    return combinations, check


def _row(op: str, backend: str, dtype: str, cases: int, worst: Worst, case: str, option: str) -> ValidationRow:
    words = f"case {case}, option {option}, {worst}"
    return ValidationRow(op, backend, dtype, cases, worst.error, worst.bound, worst.passed, case, option, words)


def _guarded(call: Callable[[], dict[str, Worst]], backends: Sequence[str]) -> dict[str, Worst]:
    """An exception is a finding like any other: the remaining operations are still of interest."""
    try:
        return call()
    except Exception as error:
        return dict.fromkeys(backends, Worst("call", passed=False, reason=f"raised {type(error).__name__}: {error}"))


def _table(rows: Sequence[ValidationRow]) -> Table:
    table = Table("operation", "backend", "dtype", "cases", "worst (ulp)", "bound (ulp)", "in case", "result")
    for row in rows:
        result = "[green]pass[/]" if row.passed else "[red]FAIL[/]"
        table.add_row(
            row.op,
            row.backend,
            row.dtype,
            str(row.cases),
            f"{row.error_ulp:.3g}",
            f"{row.bound_ulp:.3g}",
            f"{row.case} {row.option}",
            result,
        )
    return table


def _device_type(device: str) -> str:
    """Raises click's error for a device that is not there."""
    try:
        kind = torch.device(device).type
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise click.UsageError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return kind


@click.command()
@click.option("--json", "json_path", type=click.Path(dir_okay=False, allow_dash=True), help="Write the rows as JSON; - for stdout, alone.")
@click.option("--backend", "backends", multiple=True, type=click.Choice(BACKENDS), help="Only this backend; may be repeated.")
@click.option("--op", "ops", multiple=True, type=click.Choice(OPERATIONS), help="Only this operation; may be repeated.")
@click.option("--device", default="cpu", show_default=True, help="Where the operations run: cpu, cuda, cuda:1.")
@click.option("--seed", default=0, show_default=True, help="Of the inputs.")
def validate(json_path: str | None, backends: tuple[str, ...], ops: tuple[str, ...], device: str, seed: int) -> None:
    """Check every operation on every backend against the float64 reference.

    The bound of each element is derived from the roundings that lead to it; shown is the element that used most of its bound. The exit code
    is 1 if any element exceeds its bound.
    """
    device_type = _device_type(device)
    for name in backends:
        if (reason := reason_missing(name, device_type)) is not None:
            raise click.UsageError(f"backend {name!r} cannot be used: {reason}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of small calls: waking threads would cost more than it saves
    try:
        chosen = backends or (*available(device_type), *([] if device_type == "cpu" else [AUTOMATIC]))
        rows = list(validate_rows(chosen, ops or OPERATIONS, seed=seed, device=device))
    finally:
        torch.set_num_threads(threads)
    if json_path is not None:
        with click.open_file(json_path, "w") as file:
            json.dump({"torch": torch.__version__, "device": device, "seed": seed, "rows": [asdict(row) for row in rows]}, file, indent=1)
            file.write("\n")
    failures = [row for row in rows if not row.passed]
    if json_path != "-":
        console = Console()
        console.print(_table(rows))
        for name in BACKENDS:
            if (reason := reason_missing(name, device_type)) is not None:
                console.print(f"{name}: not checked, {reason}", markup=False, highlight=False)
        for row in failures:
            console.print(f"FAIL {row.op} {row.backend} {row.dtype}: {row.worst}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"{sum(row.cases for row in rows)} checks, {len(failures)} of {len(rows)} rows failed", highlight=False)
    if failures:
        sys.exit(1)
