"""The host's work for a step on its way to a device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.host import bars
from sam_kernels.backends.triton._requirements import REASON_MISSING

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(REASON_MISSING is not None, reason=str(REASON_MISSING))
def test_both_backends_are_measured_beside_torch(tmp_path: Path) -> None:
    path = tmp_path / "host.json"
    options = ["--tensors", "148", "--base", "sgd", "--repeats", "2", "--json", str(path)]
    done = subprocess.run([sys.executable, "-m", "bench.host", *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "native: at most 0.35 of torch's fused AdamW step, 148 tensors, gradients moved: not measured" in done.stdout
    rows = json.loads(path.read_text())["rows"]
    assert [(row["base"], row["n_tensors"], row["gradients"]) for row in rows] == [("sgd", 148, "kept"), ("sgd", 148, "moved")]
    for row in rows:
        assert all(0 < low <= middle <= high for low, middle, high in row["ms"].values())


def test_bars() -> None:
    row = {"base": "adamw", "n_tensors": 148, "gradients": "moved", "of_torch": {"native": 0.3, "triton": 0.9}}
    assert [line.rpartition(": ")[2] for line in bars([row])] == ["pass", "FAIL"]
    assert all(line.endswith("not measured") for line in bars([row | {"gradients": "kept"}]))
