"""Red tests, no numbers, operation by operation: what the reference tests of this run said about it on each backend."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.record import row_of

__all__ = ["PER_SAMPLE_TESTS", "PLUGIN", "TESTS", "Gate", "condensed", "read", "run"]

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/gpu/test_against_reference.py"
PER_SAMPLE_TESTS = "tests/gpu/test_per_sample.py"
PLUGIN = ("-q", "-p", "no:cacheprovider", "-p", "bench.gpu.pytest_rows")  # options of pytest: rows as they come
TIME_LIMIT = 300
_ID = re.compile(r"test_matches_the_reference\[(?P<op>\w+)-(?P<option>\w+)-(?P<backend>\w+)\]")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Gate:
    """``line``: for the result file. An operation is open on a backend that has passed tests and no failed one."""

    line: str
    green: frozenset[tuple[str, str]] = frozenset()
    is_off: bool = False

    def allows(self, op: str, backend: str) -> bool:
        """Torch's own operations are not ours to test."""
        return self.is_off or backend == "torch" or (op, backend) in self.green

    def refused(self, ops: Collection[str], backends: Collection[str]) -> list[str]:
        return [f"{op} on {backend}" for op in ops for backend in backends if not self.allows(op, backend)]


def _of(row: Row) -> tuple[str, str] | None:
    """The operation and the backend that a test is about: the smoke test says so, the others have it in their names."""
    if "backend" in row:
        return row["op"], row["backend"]
    match = _ID.search(row["name"])
    return (match["op"], match["backend"]) if match else None


def _counts(rows: Iterable[Row]) -> Counter[tuple[str, str, str]]:
    """{(operation, backend, outcome): tests}"""
    found: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        if row["kind"] == "test" and row["outcome"] != "skipped" and (case := _of(row)) is not None:
            found[(*case, row["outcome"])] += row.get("count", 1)
    return found


def condensed(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """As few rows as say the same to :func:`read`."""
    tests = [{"op": op, "backend": backend, "outcome": out, "count": count} for (op, backend, out), count in _counts(rows).items()]
    return [*({"kind": "test", **row} for row in tests), *(dict(row) for row in rows if row["kind"] == "phase")]


def read(rows: Sequence[Row]) -> Gate:
    """From the rows of tests. Tests that were cut off allow what has passed until then."""
    counts = _counts(rows)
    cases = {state: {(op, backend) for op, backend, out in counts if out == state} for state in ("passed", "failed")}
    passed, red = (sum(count for (*_, out), count in counts.items() if out == state) for state in ("passed", "failed"))
    late = [row["name"] for row in rows if row["kind"] == "phase" and row["state"].startswith("cut off")]
    state = "failed" if red or not passed else f"passed until {' and '.join(late)} was cut off" if late else "passed"
    return Gate(f"{state}: tests against the reference: {passed} passed, {red} failed", frozenset(cases["passed"] - cases["failed"]))


def run(workers: list[str]) -> Gate:
    """Runs the reference tests first. ``workers``: options for pytest."""
    command = [sys.executable, "-m", "pytest", *PLUGIN, *workers, TESTS, PER_SAMPLE_TESTS]
    late: list[Row] = []
    try:
        output = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=TIME_LIMIT, check=False).stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        late = [{"kind": "phase", "name": TESTS, "state": f"cut off after {TIME_LIMIT} s"}]
    return read([*filter(None, map(row_of, output.decode(errors="replace").splitlines())), *late])
