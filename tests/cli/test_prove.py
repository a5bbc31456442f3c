"""``prove``: verdicts, what a failure, an error and an interrupt leave behind, and that timed results are compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from sam_kernels.cli.prove import command, speed
from sam_kernels.cli.prove.claims import Bar, Claim, Measured, bar, difference
from sam_kernels.cli.prove.networks import late_start
from sam_kernels.cli.prove.pool import Pool

BARS = (Bar("SGD", 60.0, 1.0), Bar("SAM", 70.0, None))


def no_jobs(function: Callable[..., Any], jobs: Sequence[Mapping[str, Any]]) -> list[Any]:
    raise AssertionError("no run was to be made")


def claim(name: str, found: Measured | BaseException, threshold: float = 1.0) -> Claim:
    def measure(quick: bool, jobs: Any) -> Measured:
        if isinstance(found, BaseException):
            raise found
        return found

    return Claim(name, f"{name} gains", threshold, "points", measure)


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *claims: Claim) -> tuple[int, str, dict[str, Any]]:
    monkeypatch.setattr(command, "CLAIMS", claims)
    result = CliRunner().invoke(command.prove, ["--processes", "1", "--out", str(tmp_path)])
    written = tmp_path / "prove.json"
    return result.exit_code, result.output, json.loads(written.read_text()) if written.exists() else {}


@pytest.mark.parametrize(
    ("effect", "error", "is_right", "holds"),
    [
        (3.0, 0.5, True, True),
        (3.0, 1.6, True, False),  # within two standard errors of 0
        (1.9, 0.1, True, False),  # below the threshold
        (2.0, None, True, True),
        (9.0, None, False, False),  # the results that were timed differ
        (float("nan"), None, True, False),
    ],
)
def test_a_claim_needs_its_threshold_and_two_standard_errors(effect: float, error: float | None, is_right: bool, holds: bool) -> None:
    assert claim("x", Measured(0.0, None, BARS), 2.0).holds(Measured(effect, error, BARS, is_right=is_right)) is holds


def test_differences_are_paired() -> None:
    assert difference([3.0, 5.0, 4.0], [1.0, 3.0, 2.0]) == (2.0, 0.0)
    assert bar("SGD", [1.0, 3.0]) == Bar("SGD", 2.0, 1.0)
    assert bar("SGD", [1.0]).standard_error is None


def test_what_fails_is_shown_and_the_others_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = Measured(2.0, 0.1, BARS), Measured(-1.0, 0.1, BARS)
    status, said, report = run(tmp_path, monkeypatch, claim("first", bad), claim("second", ValueError("no data")), claim("third", good))
    assert status == 1
    assert [each["verdict"] for each in report["claims"]] == ["FAILS", "ERROR", "holds"]
    assert "ValueError: no data" in said
    page = (tmp_path / "prove.md").read_text(encoding="utf-8")
    assert "| **FAILS** | first gains | SGD 60 ± 1 %, SAM 70 % | -1 ± 0.1 points | ≥ 1 point |" in page
    assert (tmp_path / "prove.png").read_bytes().startswith(b"\x89PNG")
    assert run(tmp_path, monkeypatch, claim("third", good))[0] == 0


def test_an_interrupt_keeps_what_has_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, said, report = run(
        tmp_path, monkeypatch, claim("first", Measured(2.0, None, BARS)), claim("second", KeyboardInterrupt()), claim("third", ValueError())
    )
    assert status == 130
    assert "interrupted" in said
    assert [each["name"] for each in report["claims"]] == ["first"]


def test_a_run_of_two_claims_is_made_once() -> None:
    with Pool(1, Console(quiet=True)) as pool:
        jobs = [{"share": share, "steps": 10} for share in (0.2, 0.5, 0.2)]
        assert pool(late_start, jobs) == [8, 5, 8]
        pool._executor.shutdown()  # a run more would be an error
        assert pool(late_start, jobs[:1]) == [8]


def test_an_exception_of_a_run_ends_its_claim() -> None:
    with Pool(1, Console(quiet=True)) as pool, pytest.raises(TypeError):
        pool(late_start, [{"share": "much", "steps": 10}])


@pytest.mark.usefixtures("one_thread")
def test_what_is_timed_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_resnet18", lambda: [(7, 3), (5,)])
    found = speed.optimizer_step(True, no_jobs)
    assert found.is_right
    assert found.effect > 0
    monkeypatch.setattr(speed.PlainSAM, "first_step", lambda self: None)
    assert not speed.optimizer_step(True, no_jobs).is_right


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(command, "CLAIMS", (claim("first", AssertionError("it ran")),))
    result = CliRunner().invoke(command.prove, ["--out", str(tmp_path / "file" / "folder")])
    assert result.exit_code == 2
    assert "--out" in result.output
    assert "it ran" not in result.output
