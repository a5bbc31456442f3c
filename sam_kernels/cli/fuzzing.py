"""``validate --fuzz``: random calls one after the other, each failure with the command that repeats it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sam_kernels.cli.output import Ticker

if TYPE_CHECKING:
    from rich.console import Console

    from sam_kernels.validation.fuzz import Finding

__all__ = ["MOST_FAILURES", "run_fuzz"]

MOST_FAILURES = 20  # calls: more of them rarely say more


def run_fuzz(
    count: int, seed: int, backends: Sequence[str], ops: Sequence[str], device: str, console: Console, *, restricted: Sequence[str]
) -> dict[str, Any]:
    """Check calls ``seed``, ``seed`` + 1, … and return the counts and the findings, for JSON. Stops after ``MOST_FAILURES`` failed calls.

    ``restricted``: the arguments that chose backends, operations and device. They belong to the command that repeats a call.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from sam_kernels.validation.fuzz import fuzz_one
    from sam_kernels.validation.random_calls import describe, random_call

    findings: list[Finding] = []
    checks, calls, failed = 0, 0, 0
    ticker = Ticker(console)
    columns = (TextColumn("random calls"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=count)
        for each in range(seed, seed + count):
            found, checked = fuzz_one(each, backends, ops, device)
            findings += found
            calls, checks, failed = calls + 1, checks + checked, failed + bool(found)
            for finding in found:
                _say(console, f"FAIL seed {finding.seed}: {finding.op} {finding.backend}: {finding.worst}")
            if found:
                command = ["python", "-m", "sam_kernels", "validate", "--fuzz", "1", "--seed", str(each), *restricted]
                _say(console, f"repeat with: {shlex.join(command)}")
            if failed == MOST_FAILURES:
                _say(console, f"stopped after {failed} failed calls")
                break
            progress.advance(task)
            ticker.tick(f"{calls} of {count} random calls, {failed} failed")
    if count == 1:
        for line in describe(random_call(seed, ops)):
            _say(console, line)
    _say(console, f"{calls} random calls, {checks} checks, {failed} calls failed")
    return {"calls": calls, "checks": checks, "findings": [asdict(finding) for finding in findings]}


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
