"""The stages of the benchmark for a device: their order, their time, and where their rows go."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from bench.gpu import bars, gate, results, stages
from bench.gpu.__main__ import main
from bench.gpu.record import row_of
from bench.gpu.timing import HostClock


def test_rows_go_to_the_output_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "STAGES", (stages.Stage("bars", lambda run: iter([{"kind": "op", "op": "a", "backend": "b"}])),))
    given = json.dumps({"kind": "test", "name": "test_matches_the_reference[restore_-restore-foreach]", "outcome": "passed"}) + "\n"
    run = CliRunner().invoke(main, ["--dry-run", "--out", "-", "--stages", "bars", "--tests", "-"], input=given)
    assert run.exit_code == 0, run.output
    rows = [row for line in run.output.splitlines() if (row := row_of(line))]
    assert [row["kind"] for row in rows] == ["run", "run", "op"]
    assert results.result_of(rows)["rows"] == [{"kind": "op", "op": "a", "backend": "b"}]
    assert "not measured" not in run.output


def test_stages_end_before_those_after_them_and_an_error_ends_only_its_own() -> None:
    seen: list[tuple[str, float]] = []
    said: list[str] = []

    def stage(name: str, seconds_after: float = 0.0, fails: bool = False) -> stages.Stage:
        def rows(run: stages.Run) -> Any:
            seen.append((name, run.deadline))
            yield {"kind": "op", "op": name}
            if fails:
                raise RuntimeError("no memory")

        return stages.Stage(name, rows, seconds_after)

    run: Any = stages.Run(HostClock(), "cpu", gate.Gate("", is_off=True), 1e18, {}, ["fp32"], [], 1.0, said.append)
    all_of_them = (stage("first", 1e17), stage("second", 0.0, True), stage("third"), stage("last", 1e17))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "STAGES", all_of_them)
        rows = list(stages.measure(run, ["last", "second", "first"]))
    assert [row["op"] for row in rows] == ["first", "second", "last"]
    assert seen == [("first", 9e17), ("second", 1e18), ("last", 1e18)]
    assert "left out: the rest of stage second: RuntimeError: no memory" in said


def test_the_stages_are_in_the_order_of_what_they_tell() -> None:
    names = [stage.name for stage in stages.STAGES]
    assert names[:6] == ["bars", "one_1e8", "resnet18", "resnet50", "training", "one_1e9"]
    assert names[-2:] == list(stages.SWEEPS)
    cases = stages.steps_with_bars()
    assert cases[0][0] == "many_tiny"
    assert cases[-1][0] == "one_1e9"
    assert {case[:3] for case in bars.SPEEDUPS} <= set(cases)
