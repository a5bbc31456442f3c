"""Every mark of README's table of peers is what a run of that implementation shows, ✓ and ✗ alike."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.helpers.ranks import on_ranks, one_at_a_time
from tests.peers import composer
from tests.peers.implementations import IMPLEMENTATIONS
from tests.peers.ranks import on_rank, sharded, through_replicas
from tests.peers.scenarios import SCENARIOS, DoesNotHold, Undecided
from tests.peers.table import MARKS, PAGE, README, ROWS, VERSIONS, markdown, page, section

ON_RANKS = {"DDP": through_replicas, "FSDP2": sharded}
every_implementation = pytest.mark.parametrize("name", IMPLEMENTATIONS)


def _require(name: str) -> None:
    if (reason := IMPLEMENTATIONS[name].reason_missing()) is not None:
        pytest.skip(f"{name}: {reason}")


def _outcome(check: Any, *args: Any) -> tuple[str, str]:
    """The mark that a run gives, and what was observed."""
    try:
        check(*args)
    except DoesNotHold as failure:
        return "✗", str(failure)
    except Undecided as reason:
        return "–", str(reason)
    return "✓", ""


def _check(row: str, name: str, found: tuple[str, str]) -> None:
    mark, (symbol, observed) = MARKS[row][name], found
    assert symbol == mark.symbol, f"{row}, {name}: {symbol} {observed}; the table has {mark.symbol} {mark.observed}"
    for words in mark.words:
        assert words in observed, f"{row}, {name}: {observed}"


@pytest.mark.parametrize("row", SCENARIOS)
@every_implementation
def test_a_mark_is_what_a_run_shows(row: str, name: str) -> None:
    _require(name)
    _check(row, name, _outcome(SCENARIOS[row], IMPLEMENTATIONS[name]))


@cache
def _on_two_ranks(name: str) -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        return on_ranks(on_rank, Path(folder), name)


@one_at_a_time
@pytest.mark.parametrize("row", ON_RANKS)
@every_implementation
def test_a_mark_is_what_a_run_on_two_ranks_shows(row: str, name: str) -> None:
    _require(name)
    _check(row, name, _outcome(ON_RANKS[row], IMPLEMENTATIONS[name], _on_two_ranks(name)))


def test_the_table_has_every_row_and_every_implementation() -> None:
    assert set(ROWS) == set(MARKS) == {*SCENARIOS, *ON_RANKS}
    assert list(VERSIONS) == list(IMPLEMENTATIONS)
    for row, marks in MARKS.items():
        assert set(marks) == set(IMPLEMENTATIONS), row
        for name, mark in marks.items():
            assert mark.symbol in ("✓", "✗", "–"), (row, name)
            assert (mark.symbol == "✗") == bool(mark.words), (row, name)


def test_the_versions_are_those_that_run_here() -> None:
    _require("pytorch_optimizer")
    assert VERSIONS["Composer"] == composer.VERSION
    assert VERSIONS["pytorch_optimizer"] == version("pytorch_optimizer"), "run the rows with it, then change the table"


def test_the_page_is_the_tables() -> None:
    assert section(PAGE) == page(), "python -m tests.peers.table --write"


def test_so_is_readme() -> None:
    if (found := section(README)) is None:
        pytest.skip("README.md has no markers of this table")
    assert found == markdown(), "python -m tests.peers.table --write"
