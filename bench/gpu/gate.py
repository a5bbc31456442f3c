"""Red tests, no numbers, operation by operation: what the reference tests of this very run said about it on each backend."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TESTS", "Gate", "read", "run"]

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/gpu/test_against_reference.py"
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


def read(path: Path) -> Gate:
    """From pytest's JUnit file; nothing is allowed where there is none (the tests were cut off)."""
    if not path.exists():
        return Gate(f"no test results: {path.name} was not written")
    passed, failed = set(), set()
    count = red = 0
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        match = _ID.search(f"{case.get('classname')}::{case.get('name')}")
        if match is None or case.find("skipped") is not None:
            continue
        count += 1
        is_red = case.find("failure") is not None or case.find("error") is not None
        red += is_red
        (failed if is_red else passed).add((match["op"], match["backend"]))
    state = "passed" if count and not red else "failed"
    return Gate(f"{state}: {TESTS}: {count - red} passed, {red} failed", frozenset(passed - failed))


def run(path: Path, workers: list[str]) -> Gate:
    """Runs the reference tests first. ``workers``: options for pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, f"--junitxml={path}", TESTS]
    try:
        subprocess.run(command, cwd=ROOT, capture_output=True, timeout=TIME_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return Gate(f"no test results: {TESTS} took more than {TIME_LIMIT} s")
    return read(path)
