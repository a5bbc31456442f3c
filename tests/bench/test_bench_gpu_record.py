"""Files of a run on a device: line by line, on a disk that fills up, in a folder that is none."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import record, results
from bench.gpu.record import BENCH, LOG, TESTS, Record, row_of, writable
from bench.gpu.steps import BACKENDS

LIMIT = 20_000  # bytes


def op(backend: str, ms: float, **more: Any) -> dict[str, Any]:
    case = {"kind": "op", "op": "restore_", "workload": "one_1e8", "dtype": "fp32", "base": None, "backend": backend}
    return case | {"ms_50": ms, "host_us": 1.0} | more


@pytest.fixture
def _full_disk() -> Iterator[None]:
    """No file grows beyond the limit: what a process sees of a full disk, partial writes included."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("_full_disk")
def test_a_full_disk_is_told_once_and_costs_only_later_rows(tmp_path: Path) -> None:
    said: list[str] = []
    found = Record(tmp_path, said.append)
    rows = [op("native", float(i)) for i in range(300)]
    for row in rows:
        found.row(row)
    found.log("still there")
    assert found.rows == rows
    kept = results.read(tmp_path / BENCH)["rows"]
    assert 50 < len(kept) < 300
    assert kept == rows[: len(kept)]
    assert len(said) == 1
    assert said[0].startswith("bench.jsonl cannot be written (File too large): ")
    assert "OUT=folder" in said[0]
    assert (tmp_path / LOG).read_text() == "still there\n"


def test_no_file_is_larger_than_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MOST_BYTES", 1000)
    said: list[str] = []
    found = Record(tmp_path, said.append)
    for _ in range(100):
        found.log("x" * 99)
    assert (tmp_path / LOG).stat().st_size == 1100
    assert said == ["log.txt has 0.0 MB and gets no further lines"]
    assert record.MOST_BYTES < 4e6


def test_results_of_an_earlier_run_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    (tmp_path / BENCH).write_text("old\n")
    (tmp_path / TESTS).mkdir()  # cannot be replaced
    said: list[str] = []
    found = Record(tmp_path, said.append)
    found.start([BENCH, TESTS])
    found.row(op("native", 1.0))
    found.row({"kind": "test", "name": "a", "outcome": "passed"})
    assert json.loads((tmp_path / BENCH).read_text()) == op("native", 1.0)
    assert said == ["tests.jsonl cannot be replaced (Is a directory)"]


def test_a_folder_that_cannot_be_written_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record.tempfile, "tempdir", str(tmp_path))
    file = tmp_path / "file"
    file.write_text("")
    said: list[str] = []
    for asked in (file, file / "below"):
        instead = writable(asked, said.append)
        assert instead is not None
        assert (instead.is_dir(), instead.parent) == (True, tmp_path)
    assert said[0] == f"{file} cannot be written (File exists): results go to a temporary folder; choose another with OUT=folder"
    assert "(Not a directory)" in said[1]
    assert writable(tmp_path / "new" / "folder", said.append) == tmp_path / "new" / "folder"
    assert len(said) == 2
    monkeypatch.setattr(record.tempfile, "tempdir", str(file))
    found = Record(writable(file, said.append), said.append)
    assert found.folder is None
    found.start([BENCH])
    found.row(op("native", 1.0))
    assert found.rows == [op("native", 1.0)]
    assert "results go to no file" in said[-1]


def test_a_line_of_output_is_a_row_or_is_none() -> None:
    assert row_of('{"kind": "op", "ms_50": NaN}') is not None
    assert [row_of(line) for line in ('{"kind": "op", "ms', "left out: a", '{"other": 1}', "")] == [None] * 4


def test_a_last_line_without_an_end_was_cut_off(tmp_path: Path) -> None:
    lines = [{"kind": "run", "gpu": "Some GPU"}, {"kind": "run", "bandwidth": {}}, *(op(name, 1.0) for name in BACKENDS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines) + '{"kind": "op", "op')
    found = results.read(tmp_path / "a.jsonl")
    assert (found["gpu"], found["bandwidth"]) == ("Some GPU", {})
    assert [row["kind"] for row in found["rows"]] == ["op", "op", "dispatch"]  # who is faster follows from the others
    (tmp_path / "a.jsonl").write_text('{"kind"\n{"kind": "run"}\n')
    with pytest.raises(ValueError, match="delimiter"):
        results.read(tmp_path / "a.jsonl")


def test_runs_on_one_device_are_one_result() -> None:
    where = {"gpu": "Some GPU", "commit": "abc", "torch": "2.11"}
    sweep = {"kind": "sweep", "backend": "native", "kernel": "norm", "dtype": "fp32", "op": "grad_norm"}
    first = where | {"gate": "a", "rows": [op("native", 1.0), op("triton", 2.0), sweep | {"cut": "8k/2"}, sweep | {"cut": "8k/4"}]}
    second = where | {"gate": "b", "rows": [op("native", 3.0), sweep | {"cut": "16k/2"}]}
    other = where | {"commit": "def", "rows": [op("native", 9.0)]}
    merged, alone = results.merge([first, second, other])
    assert merged["gate"] == "b"
    assert [row for row in merged["rows"] if row["kind"] == "op"] == [op("triton", 2.0), op("native", 3.0)]
    assert [row["cut"] for row in merged["rows"] if row["kind"] == "sweep"] == ["16k/2"]
    (faster,) = (row for row in merged["rows"] if row["kind"] == "dispatch")
    assert faster["winner"] == "triton"
    assert alone["rows"] == other["rows"]
