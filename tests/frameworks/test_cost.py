"""``python -m bench.frameworks``: every loop makes the passes that it stands for, and every framework that is installed has a row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.frameworks.loops import FRAMEWORKS, PLAIN, PLAIN_BACKWARD, PLAIN_SAM, make_loop, missing, names_of
from bench.frameworks.measure import STUB
from bench.frameworks.problem import Stub

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_loop_makes_its_passes(framework: str, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := missing(framework)) is not None:
        pytest.skip(reason)
    calls = 0
    forward = Stub.forward

    def counted(self: Stub, input_ids: Any, labels: Any) -> Any:  # whose arguments Trainer reads
        nonlocal calls
        calls += 1
        return forward(self, input_ids, labels)

    monkeypatch.setattr(Stub, "forward", counted)
    found = []
    make_loop(names_of(framework)[passes - 1], STUB, 4)(lambda: found.append(calls))
    assert found == [passes * step for step in (1, 2, 3, 4)]


def test_every_framework_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    here = [name for name in FRAMEWORKS if missing(name) is None]
    path = tmp_path / "frameworks.json"
    arguments = ["--layers", "1", "--batch", "1", "--rounds", "1", "--inner", "1", "--threads", "1", "--no-gate", "--json", str(path)]
    done = subprocess.run([sys.executable, "-m", "bench.frameworks", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(path.read_text())
    assert result["allocator"] == "keeping"
    assert result["ms"].keys() == {PLAIN, PLAIN_SAM, PLAIN_BACKWARD, *(loop for name in here for loop in names_of(name))}
    assert [row["framework"] for row in result["rows"]] == here
    for row in result["rows"]:
        assert 0 < row["own_us"] < 5000
        assert f"{FRAMEWORKS[row['framework']]}: in the integration's own functions: at most 1 % of a step: " in done.stdout
