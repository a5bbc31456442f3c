"""Red tests, no numbers: a fast kernel that is wrong has no speed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

__all__ = ["TESTS", "GateError", "command", "run"]

ROOT = Path(__file__).parent.parent
TESTS = ("tests/ops",)
TIME_LIMIT = 900  # seconds: on two cores that others use too, tests/ops takes more than 200


class GateError(click.ClickException):
    """The tests of the operations do not pass here."""


def command(root: Path = ROOT, tests: Sequence[str] = TESTS) -> list[str]:
    """The tests of what is measured, or, where the tests are not at hand, the comparison of every backend with the reference.

    Tests that compare pages with stored results are left out: a result that has just been stored is on no page yet.
    """
    if (root / "tests" / "ops").is_dir():
        return [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow and not stored", "-p", "no:cacheprovider", *tests]
    return [sys.executable, "-m", "sam_kernels", "validate"]


def run(root: Path = ROOT, tests: Sequence[str] = TESTS) -> str:
    """One line for the result file. Raises :class:`GateError` where the command fails or takes too long."""
    arguments = command(root, tests)
    start = time.perf_counter()
    shown = " ".join(["python", *arguments[1:]])
    try:
        result = subprocess.run(arguments, cwd=root, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    except subprocess.TimeoutExpired as error:
        raise GateError(f"no numbers: `{shown}` took more than {TIME_LIMIT} s") from error
    lines = (result.stdout + result.stderr).strip().splitlines()
    if result.returncode != 0:
        raise GateError(f"no numbers: `{shown}` failed (--no-gate measures all the same)\n" + "\n".join(lines[-15:]))
    return f"passed: {shown}: {lines[-1] if lines else 'no output'} ({time.perf_counter() - start:.0f} s)"
