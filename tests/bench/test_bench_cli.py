from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench import __main__ as bench
from bench import against, allocator, command, gate, parts
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
    "samples",
    "regime",
}
TINY = ("--workloads", "many_tiny", "--no-gate", "--allocator", "default", "--rounds", "2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of a small run of steps and two operations."""
    target = tmp_path_factory.mktemp("bench") / "out.json"
    some = ("--providers", "davda54/fused,torch._foreach_/fused", "--operations", "grad_norm,perturb_ from backups", "--bases", "sgd")
    run = CliRunner().invoke(main, [*TINY, *some, "--parts", "operations,steps,memory", "--json", str(target)])
    assert run.exit_code == 0, run.output
    assert "over sam_kernels" in run.output
    assert "skipped steps of sgd in bf16" in run.output
    found: dict[str, Any] = json.loads(target.read_text())
    return found


def test_a_result_tells_where_and_how_it_was_measured(tiny: dict[str, Any]) -> None:
    assert {"commit", "dirty", "cpu", "torch", "peers", "compiler", "instruction_set", "threads", "load_1min", "command"} <= set(tiny)
    assert (tiny["gate"], tiny["quick"], tiny["allocator"]) == ("skipped", False, allocator.current())
    assert tiny["peers"]["pytorch_optimizer"]
    assert tiny["peers"]["unifiedsam"]


def test_steps_come_first_and_have_ratios_of_the_same_round(tiny: dict[str, Any]) -> None:
    kinds = [row["kind"] for row in tiny["rows"]]
    assert kinds == sorted(kinds, key=["step", "op"].index), "the parts have one order, whatever that of the option"
    assert all(set(row) >= ROW_KEYS for row in tiny["rows"])
    steps = {row["backend"]: row for row in tiny["rows"] if row["kind"] == "step" and row["micro_batches"] == 1}
    assert set(steps) == {REFERENCE, "davda54/fused", "torch._foreach_/fused"}
    assert steps[REFERENCE]["over_reference_50"] == 1.0
    assert {row["samples"] for row in steps.values()} == {2}


def test_operations_are_beside_the_native_backend_and_the_fallback(tiny: dict[str, Any]) -> None:
    rows = {(row["op"], row["backend"]): row for row in tiny["rows"] if row["kind"] == "op"}
    backends = {backend for _, backend in rows}
    assert {"native", "foreach", "native, plain lists", "torch"} <= backends
    assert set(rows) == {(op, backend) for op in ("grad_norm", "perturb_ from backups") for backend in backends}
    assert all(row["over_native_50"] == 1.0 for (_, backend), row in rows.items() if backend == "native")
    assert all(row["of_floor_50"] is None for row in rows.values()), "what stays in the caches has no floor"


def test_two_files_for_training_steps_and_for_the_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(parts, "measure", lambda part, *_: iter([{"kind": part, "model": part}] if part != "memory" else []))
    monkeypatch.setattr(bench, "print_result", lambda *_: None)
    monkeypatch.setattr(bench, "print_summary", lambda *_: None)
    monkeypatch.setattr(allocator, "ensure", lambda *_: None)
    assert CliRunner().invoke(main, ["--no-gate", "--store"]).exit_code == 0
    (folder,) = tmp_path.iterdir()
    rows = {path.name: [row["kind"] for row in json.loads(path.read_text())["rows"]] for path in folder.iterdir()}
    assert rows == {"training.json": ["training"], "optimizer.json": ["steps", "operations"]}
    assert (
        CliRunner().invoke(main, ["--no-gate", "--store", "--allocator", "returning", "--parts", "steps,operations,memory"]).exit_code == 0
    )
    assert {path.name for path in folder.iterdir()} == {*rows, "optimizer_returning.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "resnet19"], "resnet18"),
        (["--parts", "step"], "steps"),
        (["--quick", "--store"], "whole files"),
        (["--parts", "steps", "--store"], "steps, operations and memory together"),
    ],
)
def test_what_cannot_be_measured_or_stored_is_refused(arguments: list[str], message: str) -> None:
    run = CliRunner().invoke(main, [*arguments, "--no-gate"])
    assert run.exit_code == 2
    assert message in run.output


def test_a_budget_is_shared_in_the_proportions_of_the_parts() -> None:
    own = parts.seconds_of(parts.PARTS, None)
    assert own == {part: 60 * parts.MINUTES.get(part, 0.0) for part in parts.PARTS}
    assert own["memory"] == 0.0
    half = parts.seconds_of(("steps", "operations"), (parts.MINUTES["steps"] + parts.MINUTES["operations"]) / 2)
    assert half == {part: own[part] / 2 for part in ("steps", "operations")}
    assert parts.seconds_of(("memory",), 5.0) == {"memory": 0.0}


def test_compare_is_a_command_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"rows": [{"kind": "step", "ms_50": 1.0}]}')
    (tmp_path / "b.json").write_text('{"rows": [{"kind": "step", "ms_50": 1.2}]}')
    assert CliRunner().invoke(main, ["compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")]).exit_code == 0
    assert CliRunner().invoke(main, ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]).exit_code == 1


def test_another_revision_is_compared_by_bench_against(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(against.main, "callback", lambda **given: seen.update(given))
    run = CliRunner().invoke(main, ["--base", "HEAD~3", "--workloads", "resnet18", "--bases", "sgd", "--no-gate"])
    assert run.exit_code == 0, run.output
    assert (seen["commit"], seen["workloads"], seen["bases"], seen["with_gate"]) == ("HEAD~3", ["resnet18"], ["sgd"], False)


def test_red_tests_no_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gate, "command", lambda *where: [sys.executable, "-c", "print('2 failed'); raise SystemExit(1)"])
    run = CliRunner().invoke(main, ["--allocator", "default", "--json", str(tmp_path / "out.json")])
    assert run.exit_code == 1, run.output
    assert "2 failed" in run.output
    assert not (tmp_path / "out.json").exists()
    monkeypatch.setattr(gate, "command", lambda *where: [sys.executable, "-c", "print('9 passed')"])
    assert gate.run().startswith("passed: python -c")
    monkeypatch.setattr(gate, "command", lambda *where: [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(gate, "TIME_LIMIT", 0.2)
    with pytest.raises(gate.GateError, match="more than"):
        gate.run()


def test_gate_runs_the_tests_of_what_is_measured(tmp_path: Path) -> None:
    assert all((Path(__file__).parents[2] / name).exists() for name in parts.TESTS)
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
