"""Red tests, no numbers, operation by operation: what the reference tests of this very run said about it on each backend."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PER_SAMPLE_TESTS", "TESTS", "Gate", "read", "run"]

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/gpu/test_against_reference.py"
PER_SAMPLE_TESTS = "tests/gpu/test_per_sample.py"
TIME_LIMIT = 300
_ID = re.compile(r"test_matches_the_reference\[(?P<op>\w+)-(?P<option>\w+)-(?P<backend>\w+)\]")


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


def read(paths: Sequence[Path]) -> Gate:
    """From pytest's JUnit files; nothing is allowed by one that is not there (the tests were cut off)."""
    passed, failed = set(), set()
    count = red = 0
    for case in (case for path in paths if path.exists() for case in ElementTree.parse(path).getroot().iter("testcase")):
        match = _ID.search(f"{case.get('classname')}::{case.get('name')}")
        if match is None or case.find("skipped") is not None:
            continue
        count += 1
        is_red = case.find("failure") is not None or case.find("error") is not None
        red += is_red
        (failed if is_red else passed).add((match["op"], match["backend"]))
    absent = [path.name for path in paths if not path.exists()]
    state = "passed" if count and not red and not absent else "failed"
    missing = f"; {', '.join(absent)} not written" if absent else ""
    return Gate(f"{state}: {TESTS}: {count - red} passed, {red} failed{missing}", frozenset(passed - failed))


def run(path: Path, workers: list[str]) -> Gate:
    """Runs the reference tests first. ``workers``: options for pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, f"--junitxml={path}", TESTS, PER_SAMPLE_TESTS]
    try:
        subprocess.run(command, cwd=ROOT, capture_output=True, timeout=TIME_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return Gate(f"no test results: {TESTS} took more than {TIME_LIMIT} s")
    return read([path])
