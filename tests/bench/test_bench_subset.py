"""Training steps of SAM on a part of the parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.subset import BAR, FROZEN_NORMS, PROVIDERS, bars

ROOT = Path(__file__).resolve().parents[2]


def test_every_provider_is_measured_over_the_base(tmp_path: Path) -> None:
    path = tmp_path / "subset.json"
    options = ["--models", "transformer", "--batch", "1", "--rounds", "1", "--threads", "1", "--json", str(path)]
    done = subprocess.run([sys.executable, "-m", "bench.subset", *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"transformer: at most {BAR} base steps: " in done.stdout
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["model"], row["batch"], row["threads"]) == ("transformer", 1, 1)
    assert row["of_base"].keys() == row["ms"].keys() == {"base", *PROVIDERS}
    assert row["of_base"]["base"] == 1.0
    assert all(0 < low <= middle <= high for low, middle, high in row["ms"].values())


def test_bars() -> None:
    rows = [{"model": "small", "of_base": {FROZEN_NORMS: ratio}} for ratio in (BAR, BAR + 0.01)]
    assert [line.rpartition(": ")[2] for line in bars(rows)] == ["pass", "FAIL"]
