"""A step over DTensors beside other steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.ranks import one_at_a_time

pytestmark = one_at_a_time
ROOT = Path(__file__).resolve().parents[2]


def test_steps_collectives_and_objects_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "shards.json"
    options = ["--repeats", "2", "--steps", "3", "--json", str(path)]
    done = subprocess.run([sys.executable, "-m", "bench.shards", *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert path.exists(), done.stderr
    one, two = json.loads(path.read_text())["rows"]
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert one["collectives"] == []
    assert two["collectives"] == [8, 4]  # the norm; the agreement on a skipped step
    assert [set(row["ms"]) - set(row["of"]) for row in (one, two)] == [set(), {"its all-reduces alone"}]
    for row in (one, two):
        assert all(0 < low <= middle <= high for low, middle, high in row["ms"].values())
        assert abs(row["objects_more"]) < 148  # not one more a parameter
