"""Steps of this checkout against those of another commit."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import against

pytestmark = pytest.mark.skipif(
    subprocess.run(["git", "rev-parse", "HEAD"], cwd=against.ROOT, capture_output=True).returncode != 0, reason="no git checkout"
)


def test_both_take_the_same_steps_and_the_ratios_are_to_the_commit_before(tmp_path: Path) -> None:
    path = tmp_path / "against.json"
    options = ["HEAD", "--workloads", "many_tiny", "--bases", "sgd", "--repeats", "2", "--times", "1", "--no-gate", "--json", str(path)]
    done = CliRunner().invoke(against.main, options, catch_exceptions=False)
    assert done.exit_code == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["workload"], row["base"], set(row["ms"])) == ("many_tiny", "sgd", {"before", "control", "now"})
    assert row["ratios"]["before"] == [1.0, 1.0, 1.0]
    assert 0.1 < row["ratios"]["now"][1] < 10


def test_the_other_package_is_one_of_its_own(tmp_path: Path) -> None:
    other = against.load(against.extract("HEAD", tmp_path / "checkout"), "sam_kernels_other")
    assert other.__name__ == "sam_kernels_other"
    assert other.SAM is not against.sam_kernels.SAM
    assert other.SAM.__module__.startswith("sam_kernels_other.")
