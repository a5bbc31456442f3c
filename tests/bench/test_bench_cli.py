from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import allocator, gate
from bench.__main__ import main
from bench.providers import REFERENCE

ROW_KEYS = {
    "kind",
    "op",
    "workload",
    "dtype",
    "base",
    "backend",
    "n_tensors",
    "numel",
    "bytes",
    "ms_20",
    "ms_50",
    "ms_80",
    "gbps",
    "regime",
}


def test_quick_run_end_to_end(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    arguments = ["--workload", "many_tiny", "--dtype", "fp32", "--base", "sgd", "--quick", "--no-gate", "--json", str(target)]
    run = CliRunner().invoke(
        main, [*arguments, "--repeats", "1", "--providers", "davda54/fused,torch._foreach_/fused", "--ops", "grad_norm"]
    )
    assert run.exit_code == 0, run.output
    result = json.loads(target.read_text())
    assert result["gate"] == "skipped"
    assert result["allocator"] == allocator.current()
    assert {"commit", "dirty", "cpu", "cores", "torch", "compiler", "instruction_set", "threads"} <= set(result)
    steps = {row["backend"]: row for row in result["rows"] if row["kind"] == "step"}
    assert set(steps) == {REFERENCE, "davda54/fused", "torch._foreach_/fused"}
    assert {row["op"] for row in result["rows"] if row["kind"] == "op"} == {"grad_norm"}
    assert all(set(row) >= ROW_KEYS for row in result["rows"])
    assert steps["davda54/fused"]["reference_ms_50"] == steps[REFERENCE]["ms_50"]
    assert "skipped torch.compile: --quick" in run.output
    assert "whole step" in run.output


def test_unknown_names_are_refused() -> None:
    run = CliRunner().invoke(main, ["--workload", "resnet19", "--no-gate"])
    assert run.exit_code == 2
    assert "resnet18" in run.output
    run = CliRunner().invoke(main, ["--name", "../x", "--no-gate"])
    assert run.exit_code == 2


def test_red_tests_no_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gate, "command", lambda *where: [sys.executable, "-c", "print('2 failed'); raise SystemExit(1)"])
    run = CliRunner().invoke(main, ["--json", str(tmp_path / "out.json")])
    assert run.exit_code == 1
    assert "2 failed" in run.output
    assert not (tmp_path / "out.json").exists()
    monkeypatch.setattr(gate, "command", lambda *where: [sys.executable, "-c", "print('9 passed')"])
    assert gate.run().startswith("passed: python -c")
    monkeypatch.setattr(gate, "command", lambda *where: [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(gate, "TIME_LIMIT", 0.2)
    with pytest.raises(gate.GateError, match="more than"):
        gate.run()


def test_gate_runs_the_tests_of_the_operations(tmp_path: Path) -> None:
    assert gate.command(tmp_path)[-1] == "validate"
    (tmp_path / "tests" / "ops").mkdir(parents=True)
    assert gate.command(tmp_path)[-1] == "tests/ops"


def test_allocator_regimes(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda path, arguments, env: started.append((arguments, env)))
    for name in allocator.settings(os.environ):
        monkeypatch.delenv(name)
    allocator.ensure("default", "bench", [])
    assert not started
    allocator.ensure("keeping", "bench", ["--quick"])
    (arguments, env) = started.pop()
    assert arguments[1:] == ["-m", "bench", "--quick"]
    assert allocator.current(env) == "keeping"
    for name, value in allocator.REGIMES["returning"].items():
        monkeypatch.setenv(name, value)
    assert allocator.current() == "returning"
    allocator.ensure("returning", "bench", [])
    assert not started
    assert allocator.current({"MALLOC_ARENA_MAX": "1"}) == "MALLOC_ARENA_MAX=1"


def test_a_new_process_has_the_settings_of_one_regime_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is measured in processes that return what is freed, also from one that keeps it: all peaks would be 0 otherwise."""
    for name in allocator.settings(os.environ):
        monkeypatch.delenv(name)
    for name, value in allocator.REGIMES["keeping"].items():
        monkeypatch.setenv(name, value)
    env = allocator.variables("returning")
    assert allocator.current(env) == "returning"
    assert env["PATH"] == os.environ["PATH"]
