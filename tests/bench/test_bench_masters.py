"""Steps and operations with float32 masters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import floor
from bench.byte_model import MASTER_OPS
from bench.masters import passes
from bench.masters.bars import verdicts
from bench.masters.loop import IMPLEMENTATIONS
from bench.masters.memory import MIXED_PRECISION
from bench.masters.passes import STOCHASTIC
from bench.masters.steps import FLOAT32, LOOP, MASTERS, OPTIONS
from bench.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[2]


def test_everything_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "masters.json"
    arguments = [
        "--workload",
        "many_tiny",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--no-gate",
        "--no-passes",
        "--bases",
        "sgd",
        "--json",
        str(path),
    ]
    done = subprocess.run([sys.executable, "-m", "bench.masters", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    (row,) = found["steps"]
    assert row["ms"].keys() == {*OPTIONS, *(f"{LOOP}, {each}" for each in IMPLEMENTATIONS)}
    assert all(0 < low <= middle <= high for low, middle, high in row["ms"].values())
    assert row["of_masters"][MASTERS] == 1.0
    assert row["bytes_per_param"].keys() == {*OPTIONS, row["fastest_loop"]}
    for name, memory in row["bytes_per_param"].items():
        # SAM in float32 has a backup of 4 bytes, the loop one of 2 within a step, and float32 gradients.
        more = {FLOAT32: 4, row["fastest_loop"]: 4}.get(name, 0)
        if "updates" not in name:
            assert memory["between"] == pytest.approx(MIXED_PRECISION[row["base"]] + more)
        assert memory["peak"] >= memory["between"]
    assert found["passes"] == []
    nearest, one, _, many = found["rounding"]["rows"]
    assert one["cosine"] < nearest["cosine"] < many["cosine"]
    assert "sgd: 0 B a parameter between steps beyond mixed precision: 0.00: pass" in done.stdout


def test_every_operation_of_a_step_is_one_of_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "library", lambda: "no C++ compiler on PATH")
    rows = passes.measure(WORKLOADS["many_tiny"], rounds=1)
    assert [row["op"] for row in rows if STOCHASTIC not in row["op"]] == list(MASTER_OPS)
    assert [row["op"] for row in rows if row["pct_floor"] is not None] == ["grad_norm", "check_finite_"]  # of which torch has a floor


def test_bars() -> None:
    step = {"base": "sgd", "threads": 1, "fastest_loop": LOOP, "of_masters": {FLOAT32: 1.25, LOOP: 2.9}}
    step["bytes_per_param"] = {MASTERS: {"between": 12.0, "peak": 12.6}}
    rows = [{"op": "restore_", "pct_floor": 85.0}, {"op": f"perturb_{STOCHASTIC}", "pct_floor": 1.0}, {"op": "perturb_", "pct_floor": None}]
    found = [line.rpartition(": ")[2] for line in verdicts({"steps": [step], "passes": rows})]
    assert found == ["pass", "FAIL", "pass", "FAIL", "pass"]
