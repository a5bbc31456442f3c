"""Operations over 16-bit parameters with float32 masters, beside plain passes."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from bench import masters
from bench.workloads import Workload


def test_bytes_are_those_of_each_list() -> None:
    """Masters and moments of 4 bytes, parameters and gradients of 2; what is updated is read and written."""
    assert {op: masters.moved_bytes(op, 1) for op in masters.OPS} == {"restore_": 6, "perturb_": 8, "sgd_step_": 20, "adamw_step_": 28}


def test_every_operation_is_measured_beside_a_plain_pass(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(masters.WORKLOADS, "gpt2_124m", Workload("gpt2_124m", "", ((64, 32), (33,))))
    path = tmp_path / "masters.json"
    done = CliRunner().invoke(masters.main, ["--rounds", "2", "--json", str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = json.loads(path.read_text())["rows"]
    assert [row["op"] for row in rows] == list(masters.OPS)
    for row in rows:
        assert all(0 < low <= middle <= high for low, middle, high in row["ms"].values())
        assert row["pct_plain"].keys() <= row["ms"].keys()
        assert sum(name.startswith("plain: ") for name in row["ms"]) == 1
