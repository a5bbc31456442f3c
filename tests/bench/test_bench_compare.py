"""Two result files compared: which figures differ, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bench.compare import changes, main, measurements

ROOT = Path(__file__).parents[2]


def _row(provider: str, ms: float, over: float, **more: Any) -> dict[str, Any]:
    quantiles = {"ms_20": 0.9 * ms, "ms_50": ms, "ms_80": 1.2 * ms, "over_base_20": 0.0, "over_base_50": over, "over_base_80": 9.0}
    return {"kind": "training", "model": "mlp", "provider": provider, "batch": 8, "rounds": 12, **quantiles, **more}


def _write(path: Path, *rows: dict[str, Any], **more: Any) -> Path:
    path.write_text(json.dumps({"schema": 1, "device": "some-cpu", "threads": 2, "rows": rows, **more}))
    return path


def _compare(old: Path, new: Path, *extra: str) -> Result:
    return CliRunner().invoke(main, [str(old), str(new), *extra])


def test_exit_status_follows_the_threshold(tmp_path: Path) -> None:
    old = _write(tmp_path / "old.json", _row("base", 10.0, 1.0), _row("ours", 20.0, 2.0))
    near = _write(tmp_path / "near.json", _row("base", 10.5, 1.0, rounds=60), _row("ours", 20.0, 2.18))
    far = _write(tmp_path / "far.json", _row("base", 12.0, 1.0), _row("ours", 20.0, 2.0))
    assert _compare(old, old).exit_code == 0
    same = _compare(old, near)
    assert same.exit_code == 0, same.output
    assert "0 of 4 figures differ by more than 10%" in same.output
    assert "the largest difference is 9.0%" in same.output
    assert _compare(old, near, "--threshold", "0.08").exit_code == 1
    found = _compare(old, far)
    assert found.exit_code == 1
    assert "1 of 4 figures" in found.output
    assert "1.200" in found.output
    assert _compare(far, old).exit_code == 1, "faster is a difference too"
    assert _compare(old, far, "--only", "ratios").exit_code == 0
    assert _compare(old, far, "--only", "medians").exit_code == 1


def test_settings_and_quantiles_are_no_figures(tmp_path: Path) -> None:
    assert set(measurements({"rows": [_row("ours", 20.0, 2.0)]})) == {
        ("training", "mlp", "ours", "batch 8", "ms_50"),
        ("training", "mlp", "ours", "batch 8", "over_base_50"),
    }
    other = _write(tmp_path / "other.json", _row("ours", 90.0, 9.0, batch=16))
    refused = _compare(_write(tmp_path / "old.json", _row("ours", 20.0, 2.0)), other)
    assert refused.exit_code == 2, "another batch is another measurement"


def test_what_is_in_one_file_alone_is_said(tmp_path: Path) -> None:
    old = _write(tmp_path / "old.json", _row("base", 10.0, 1.0), _row("ours", 20.0, 2.0))
    new = _write(tmp_path / "new.json", _row("base", 10.0, 1.0))
    done = _compare(old, new)
    assert done.exit_code == 0
    assert "only in the old file: 2 figures, for example training, mlp, ours" in done.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rows": [', "not JSON"),
        ("[1, 2]", "a list, not a result"),
        ('{"device": "another"}', "device"),
        ('{"rows": []}', "nothing in common"),
    ],
)
def test_files_that_cannot_be_compared(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    good = _write(tmp_path / "good.json", _row("base", 10.0, 1.0))
    for pair in ((tmp_path / "bad.json", good), (good, tmp_path / "bad.json")):
        refused = _compare(*pair)
        assert refused.exit_code == 2
        assert message in refused.output
        assert len(refused.output.strip().splitlines()) == 1


def test_a_figure_that_was_zero_or_is_no_number() -> None:
    old, new = ({"rows": [{"kind": "x", "ms": value}]} for value in (0.0, 1.0))
    assert changes(old, new)[0].by == float("inf")
    assert changes(old, old)[0].by == 0.0
    broken = {"rows": [{"kind": "x", "ms": float("nan")}]}
    assert changes(new, broken)[0].by == changes(broken, new)[0].by == float("inf")
    assert measurements({"rows": [{"kind": "x", "over_reference_50": None, "ms": {"a": [1.0, 2.0, 3.0]}}]}) == {("x", "a", "ms"): 2.0}


@pytest.mark.stored
@pytest.mark.parametrize("name", ["optimizer", "family", "per_sample", "rw_sam", "frameworks", "masters"])
def test_stored_results_can_be_compared(name: str) -> None:
    (path,) = (ROOT / "bench" / "results").glob(f"*/{name}.json")
    found = measurements(json.loads(path.read_text()))
    assert len(found) > 5
    done = _compare(path, path)
    assert done.exit_code == 0, done.output
    assert f"0 of {len(found)} figures" in done.output


@pytest.mark.stored
def test_no_two_rows_of_a_stored_result_have_one_name() -> None:
    """Otherwise one would hide the other."""
    for name, each in (("optimizer", "ms_50"), ("family", "ms_50"), ("per_sample", "ms_50")):
        (path,) = (ROOT / "bench" / "results").glob(f"*/{name}.json")
        result = json.loads(path.read_text())
        assert sum(key[-1] == each for key in measurements(result)) == sum(each in row for row in result["rows"]), name
