"""Tests against the frameworks themselves: ``make test-frameworks`` installs them. Without a framework its tests are skipped."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import version

import pytest

from bench.frameworks.operators import define_operators
from tests.frameworks.rows import Row, names_on_page, write

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are made from their configurations

define_operators()  # which timm and Lightning look up when they are imported

Compared = Callable[..., None]  # compared(framework, algorithm, what, error, bar)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="Write the errors that were measured into docs/guides/frameworks.md.")


@pytest.fixture
def compared(record_property: Callable[[str, object], None]) -> Compared:
    """``compared(framework, algorithm, what, error, bar)``: fails where the error is above the bar, and is a row of the page's table.

    ``error``: the largest relative one; 0.0 is written as "same bits", so that it needs a comparison of bits. ``framework``: the name of
    the package, whose version is in the row.
    """

    def compare(framework: str, algorithm: str, what: str, error: float, bar: float) -> None:
        assert error <= bar, f"{framework}, {algorithm}, {what}: off by {error:.2g}, {bar:.2g} allowed"
        record_property("row", (framework, version(framework), algorithm, what, "same bits" if error == 0 else f"{error:.0e}"))

    return compare


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _ROWS.update(Row(*value) for name, value in report.user_properties if name == "row")  # type: ignore[misc]


_ROWS: set[Row] = set()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--write-table") and _ROWS:
        write(_ROWS)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the page and this run do not both have, of the frameworks that this run has."""
    made = {row.name for row in _ROWS}
    ran = {row.framework for row in _ROWS}
    on_page = {name for name in names_on_page() if name[0] in ran}
    if made != on_page:
        terminalreporter.section("rows of docs/guides/frameworks.md")
        for words, names in (("new", made - on_page), ("not made by this run", on_page - made)):
            for name in sorted(names):
                terminalreporter.line(f"{words}: {', '.join(name)}")
