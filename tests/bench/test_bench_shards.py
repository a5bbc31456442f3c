"""A step over DTensors beside other steps."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from bench.shards import main
from tests.helpers.ranks import one_at_a_time

pytestmark = one_at_a_time


def test_steps_collectives_and_objects_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "shards.json"
    options = ["--repeats", "2", "--steps", "3", "--json", str(path)]
    done = CliRunner().invoke(main, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    one, two = json.loads(path.read_text())["rows"]
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert one["collectives"] == []
    assert two["collectives"] == [8, 4]  # the norm; the agreement on a skipped step
    assert [set(row["ms"]) - set(row["of"]) for row in (one, two)] == [set(), {"its all-reduces alone"}]
    for row in (one, two):
        assert all(0 < low <= middle <= high for low, middle, high in row["ms"].values())
        assert abs(row["objects_more"]) < 148  # not one more a parameter
