"""A pytest plugin: every test is a row of JSON in the output as soon as it has ended, so that a run that is cut off keeps its outcomes.

``python -m pytest -p bench.gpu.pytest_rows``; with pytest-xdist the one process that reports prints them.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

MOST_WORDS = 300


@pytest.hookimpl(trylast=True)  # after the terminal's reporter is there
def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Rows(config), "rows")


class _Rows:
    def __init__(self, config: pytest.Config) -> None:
        self.reporter: Any = config.pluginmanager.get_plugin("terminalreporter")

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str]:
        """No dots and letters: a row begins a line."""
        if report.when != "call" and not report.skipped:
            return ("error" if report.failed else "", "", "")
        return (report.outcome, "", "")

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        row = {"kind": "test", "name": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if not report.passed:
            row["words"] = _words(report)
        self.reporter.write_line(json.dumps(row))
        self.reporter.flush()


def _words(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return str(report.longrepr[2])[:MOST_WORDS]
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash is not None else str(report.longrepr))[:MOST_WORDS]
