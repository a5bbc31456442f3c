"""Runs of the papers' experiments: made once for each job and code, in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.papers import context as module
from bench.papers import schedules
from bench.papers.context import Context, digest

MADE: list[int] = []


def double(value: int) -> dict[str, Any]:
    MADE.append(value)
    return {"value": 2 * value, "calls": len(MADE)}


def test_a_run_is_made_once_for_each_job_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MADE.clear()
    context = Context(False, cache=tmp_path, processes=1)
    jobs = [{"value": value} for value in (3, 1)]
    assert [one["value"] for one in context.map(double, jobs, "double")] == [6, 2]
    context.map(double, jobs[::-1], "double")
    assert MADE == [3, 1]
    monkeypatch.setattr(module, "digest", lambda each: "other code")
    context.map(double, jobs, "double")
    assert MADE == [3, 1, 3, 1]


def test_a_quick_run_keeps_nothing(tmp_path: Path) -> None:
    Context(True, cache=tmp_path).map(double, [{"value": 1}], "double")
    assert not list(tmp_path.iterdir())


def test_the_digest_follows_what_a_module_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    before, read = digest(schedules), Path.read_bytes
    through_others = (("bench/batched.py", True), ("bench/linear_models.py", True))  # as modules, and by what is imported
    direct = (("experiment.py", True), ("schedules.py", True), ("theory/_unified.py", True), ("papers/stall.py", False))
    for changed, differs in (*direct, *through_others):
        monkeypatch.setattr(Path, "read_bytes", lambda path, changed=changed: read(path) + b"#" * str(path).endswith(changed))
        assert (digest(schedules) != before) is differs, changed
