"""The examples that need no framework, as a reader runs them. (Those that do: tests/frameworks; over shards: tests/distributed.)"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def printed(name: str, *arguments: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"examples/{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_language_model_that_overfits_is_better_by_sam_and_by_rw_sam(is_full: bool) -> None:
    for seed in (0, 1, 2) if is_full else (0,):
        text = printed("rwsam_language_model.py", str(seed))
        numbers = r"(\S+): held-out text (\S+) -> (\S+) \(best epoch: (\S+)\), training text (\S+)"
        found = {name: [float(each) for each in more] for name, *more in re.findall(numbers, text)}
        assert found.keys() == {"AdamW", "SAM", "RW-SAM"}
        before, adamw, best, fitted = found["AdamW"]
        assert fitted < 2 < adamw  # bits: it knows its own text by heart,
        assert best < adamw - 0.7  # and has been better
        for name in ("SAM", "RW-SAM"):
            assert found[name][0] == before, "all begin at the same weights"
            assert found[name][1] < adamw - 0.7, name
            assert found[name][3] > fitted, name
        (first, most), (last, least) = [tuple(map(float, each)) for each in re.findall(r"size (\S+), largest weight (\S+)", text)]
        assert 1 <= first < last <= 16  # norms become more even
        assert 1 / 16 <= least < most <= 1


def test_federated_clients_learn_and_no_two_methods_are_the_same() -> None:
    text = printed("federated_sam.py", "--rounds=3", "--seeds=1", "--alpha=1")
    found = {name: float(accuracy) for name, accuracy in re.findall(r"(\S+): round 3: (\S+) %", text)}
    assert found.keys() == {"FedAvg", "FedSAM", "server"}
    assert min(found.values()) > 60  # of ten digits, after three rounds
    assert len(set(found.values())) == 3
