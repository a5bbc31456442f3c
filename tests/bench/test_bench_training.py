"""Training steps: equal work of all implementations, ratios within a round, the command, its page and the README's figures."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from bench.page import BEGIN, END
from bench.providers import BASES, REFERENCE, RHO
from bench.training import __main__ as program
from bench.training import numbers, report, runs
from bench.training.measure import LEAST_ROUNDS, Samples, measure, rows_of
from bench.training.models import MODELS, Kind, loss_of, stack
from bench.training.numbers import lines
from bench.training.runs import BASE, LOOP, NAMES, Run

ROOT = Path(__file__).parents[2]
TINY = stack(4, 300, 8)
STEPS = 3
# Float32 against float64. An element of a gradient is a sum over 8 samples of products through four layers of width 10: 48 roundings of
# terms that are at most 1, in either pass. Of three gradients, a learning rate of 0.1 and a momentum of 0.9 add 1, 1.9 and 2.71. Then the
# weights themselves are rounded, twice a step. A step without its perturbation is off by a thousand times as much.
TOLERANCE = 2.0**-24 * (2 * 48 * 0.1 * (1 + 1.9 + 2.71) + 2 * STEPS)


def _tiny(micro_batches: int) -> Kind:
    make = TINY.make
    return Kind("tiny", make, make, "sgd", TINY.batch, TINY.batch, TINY.inputs, micro_batches=micro_batches)


def _gradient(run: Run, weights: list[Tensor], inputs: Tensor, labels: Tensor) -> list[Tensor]:
    leaves = [weight.clone().requires_grad_() for weight in weights]
    named = dict(zip((name for name, _ in run.model.named_parameters()), leaves, strict=True))
    return list(torch.autograd.grad(loss_of(torch.func.functional_call(run.model, named, inputs.double()), labels), leaves))


def _expected(run: Run, name: str, micro_batches: int) -> list[Tensor]:
    """The weights after STEPS by the formulas in float64: SGD with momentum along the mean of the gradients at the perturbed weights."""
    weights = [param.detach().double() for param in run.params]
    momenta = [torch.zeros_like(weight) for weight in weights]
    chunks = list(zip(run.inputs.chunk(micro_batches), run.labels.chunk(micro_batches), strict=True))
    for _ in range(STEPS):
        mean = [torch.zeros_like(weight) for weight in weights]
        for chunk in [(run.inputs, run.labels)] if name == BASE else chunks:
            found = _gradient(run, weights, *chunk)
            if name != BASE:
                norm = torch.stack([grad.square().sum() for grad in found]).sum().sqrt()
                perturbed = [weight + RHO / norm * grad for weight, grad in zip(weights, found, strict=True)]
                found = _gradient(run, perturbed, *chunk)
            mean = [total + grad / (1 if name == BASE else micro_batches) for total, grad in zip(mean, found, strict=True)]
        momenta = [BASES["sgd"].kwargs["momentum"] * momentum + grad for momentum, grad in zip(momenta, mean, strict=True)]
        weights = [weight - BASES["sgd"].kwargs["lr"] * momentum for weight, momentum in zip(weights, momenta, strict=True)]
    return weights


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_all_take_the_same_steps(monkeypatch: pytest.MonkeyPatch, name: str, micro_batches: int) -> None:
    kind = _tiny(micro_batches)
    if (reason := runs.missing(name, kind, 4)) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(runs, "LR", BASES["sgd"].kwargs["lr"])
    run = Run(name, kind)
    expected = _expected(run, name, micro_batches)
    run.block = STEPS
    run()
    error = max((param - weight).abs().max().item() for param, weight in zip(run.params, expected, strict=True))
    assert error <= TOLERANCE, f"{name}: off by {error:.2e}, bound {TOLERANCE:.2e}"
    assert len(run.optimizer_ms) == 1


def test_lora_trains_the_factors_alone() -> None:
    run = Run(REFERENCE, MODELS["lora"], quick=True)
    trained = {name for name, param in run.model.named_parameters() if param.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"down", "up"}
    assert len(trained) == len(run.params) == 2 * 2 * 2  # factors, layers of a block, blocks
    before = {name: param.clone() for name, param in run.model.named_parameters()}
    run()
    run()  # A's gradient is 0 while B is
    moved = {name for name, param in run.model.named_parameters() if not torch.equal(param, before[name])}
    assert moved == trained


def test_ratios_are_those_of_one_round() -> None:
    """A machine that is twice as slow in one round changes no ratio."""
    slow = [1.0, 2.0, 1.0]
    found = {
        BASE: Samples([10 * s for s in slow], [1 * s for s in slow]),
        REFERENCE: Samples([21 * s for s in slow], [3 * s for s in slow]),
        LOOP: Samples([24 * s for s in slow], [6 * s for s in slow]),
    }
    rows = {row["provider"]: row for row in rows_of(found)}
    assert [rows[name]["over_base_50"] for name in found] == [1.0, 2.1, 2.4]
    assert rows[REFERENCE]["over_base_20"] == rows[REFERENCE]["over_base_80"] == 2.1
    assert rows[REFERENCE]["over_loop_50"] == 0.875
    assert (rows[REFERENCE]["share_50"], rows[LOOP]["share_50"]) == (round(3 / 21, 5), 0.25)
    assert "over_loop_50" not in rows[BASE]
    assert rows[REFERENCE]["ms_50"] == 21.0


def test_rounds_follow_the_time_or_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    of_base: list[float] = []

    def block_of(ms: float) -> int:
        of_base.append(ms)
        return 3

    monkeypatch.setattr("bench.training.measure.block_of", block_of)
    common: dict[str, Any] = {"say": lambda line: None}
    rows = measure("tiny", TINY, (REFERENCE,), seconds=0.0, rounds=None, **common)
    assert {row["rounds"] for row in rows} == {LEAST_ROUNDS}
    assert {row["sets"] for row in rows} == {TINY.sets}
    rows = measure("tiny", TINY, (REFERENCE,), seconds=0.0, rounds=4, **common)
    assert [(row["provider"], row["rounds"]) for row in rows] == [(BASE, 4), (REFERENCE, 4)]
    assert all(0 < row["optimizer_ms_50"] < row["ms_50"] for row in rows)
    assert {row["block"] for row in rows} == {3}, "a turn is a block of steps, of the base's time"
    assert len(of_base) == 2
    assert min(of_base) > 0


def test_who_fails_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def failing(self: Run, name: str, kind: Kind) -> Any:
        if name == LOOP:
            raise RuntimeError("no such luck")
        return original(self, name, kind)

    original = Run._make_step
    monkeypatch.setattr(Run, "_make_step", failing)
    rows = measure("tiny", TINY, NAMES[:4], seconds=0.0, rounds=2, say=said.append)
    assert [row["provider"] for row in rows] == [name for name in NAMES[:4] if name != LOOP]
    assert f"skipped {LOOP}: RuntimeError: no such luck" in said


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of the smallest run, with the map."""
    path = tmp_path_factory.mktemp("training") / "training.json"
    options = ["--models", "cnn", "--quick", "--rounds", "2", "--no-gate", "--allocator", "default", "--json", str(path)]
    run = CliRunner().invoke(program.main, options)
    assert run.exit_code == 0, run.output
    assert "optimizer's share" in run.output
    return path


def test_quick_run_end_to_end(quick: Path) -> None:
    result = json.loads(quick.read_text())
    assert (result["gate"], result["quick"]) == ("skipped", True)
    assert {"commit", "torch", "load_1min", "peers", "threads", "command"} <= result.keys()
    assert all(result["peers"].values())
    steps = [row for row in result["rows"] if row["kind"] == "training"]
    assert [row["provider"] for row in steps] == list(NAMES)
    cells = {(row["tensors"], row["elements"], row["batch"]) for row in result["rows"] if row["kind"] == "regime"}
    assert cells == {(tensors, 100_000, batch) for tensors in (10, 100) for batch in (1, 16, 256)}


def test_a_model_that_does_not_fit_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program.psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * 2**30))
    run = CliRunner().invoke(program.main, ["--models", "gpt2_124m", "--no-gate", "--no-regimes", "--no-memory", "--allocator", "default"])
    assert run.exit_code == 0, run.output
    assert f"skipped gpt2_124m: needs {program.LARGE_GIB} GiB of free memory, 3 are free" in run.output


def test_numbers_of_small_models_are_not_stored() -> None:
    run = CliRunner().invoke(program.main, ["--quick", "--store"])
    assert run.exit_code == 2
    assert "not stored" in run.output


def _report(quick: Path, folder: Path, *extra: str) -> Result:
    return CliRunner().invoke(report.main, [str(quick), "--docs", str(folder / "page.md"), "--image", str(folder / "a.png"), *extra])


def test_the_page_is_written_and_checked(quick: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n{BEGIN}\n{END}\nAfter.\n")
    assert _report(quick, tmp_path, "--check").exit_code == 1, "no chart yet"
    assert _report(quick, tmp_path).exit_code == 0
    text = page.read_text()
    assert "| sam_kernels, native |" in text
    assert "| 10 | 100,000 | " in text
    assert "](a.png)" in text
    assert text.endswith(f"{END}\nAfter.\n")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert all(line.count(" | ") <= 5 for line in text.splitlines() if line.startswith("| ")), "at most six columns"
    assert _report(quick, tmp_path, "--check").exit_code == 0
    page.write_text(text.replace("1.00 (1.00", "1.01 (1.00"))
    assert _report(quick, tmp_path, "--check").exit_code == 1


def _row(provider: str, over: float) -> dict[str, Any]:
    return {"kind": "training", "model": "resnet18", "provider": provider, "over_base_50": over, "share_50": 0.02}


def _memory(backend: str, peak: int) -> dict[str, Any]:
    return {"kind": "memory", "model": "resnet18", "backend": backend, "numel": 100, "peak_bytes": peak}


def _step(backend: str, ms: float) -> dict[str, Any]:
    case = {"kind": "step", "workload": "gpt2_124m", "dtype": "fp32", "base": "sgd", "micro_batches": 1, "backend": backend}
    return {**case, "ms_20": ms, "ms_50": ms, "ms_80": ms, "over_reference_50": ms / 100.0}


def _dial() -> dict[str, Any]:
    """Costs and scores of two tasks, of which the first has two seeds at equal epochs."""
    scores = {
        "noisy-labels": ([50.0, 60.0], [50.0], [53.0, 65.0], [55.0]),
        "clean-labels": ([90.0], [90.0], [89.0], [90.0]),
    }
    cost, accuracy = [], []
    for task, (base, base_longer, sam, sam_again) in scores.items():
        for method, of_base, epochs, found in (("base", 1.0, 20, (base, base_longer)), ("sam", 2.0, 10, (sam, sam_again))):
            cost.append({"task": task, "method": method, "of_base": [of_base] * 3})
            protocols = dict(zip(("equal_epochs", "equal_time"), found, strict=True))
            accuracy.append({"task": task, "method": method, "epochs": {"equal_epochs": 10, "equal_time": epochs}, "scores": protocols})
    return {"cost": cost, "accuracy": accuracy}


def test_figures_with_their_conditions(quick: Path, tmp_path: Path) -> None:
    device = {"cpu": "Some CPU", "threads": 2}
    rows = [_row(BASE, 1.0), _row(REFERENCE, 2.04), _row(LOOP, 2.11), _memory(REFERENCE, 400), _memory(LOOP, 620)]
    steps = {**device, "allocator": "default", "rows": [_step(REFERENCE, 100.0), _step(LOOP, 330.0), _step("torch._foreach_/fused", 210.0)]}
    gain, step, optimizer, memory = lines({**device, "rows": rows}, steps, _dial())
    assert "at equal epochs / equal time: 4.0 ± 1.0 / 5.0 points with 40 % wrong labels, −1.0 / 0.0 points with clean labels" in gain
    assert f"2.04 × (ResNet-18, 32×32, batch 32; [usual loop]({numbers.EXPLAINED}) 2.11 ×). Float32, CPU: Some CPU, 2 threads. GPU:" in step
    assert "100 ms; usual loop 3.3 ×, fastest alternative (lean torch._foreach_ loop, fused base) 2.1 × as long. GPT-2" in optimizer
    assert "1.00 × the weights (ResNet-18; usual loop 1.55 ×)" in memory
    assert lines({**device, "rows": rows[:2]}, None) == [], "nothing is said of what was not measured"
    page = tmp_path / "README.md"
    page.write_text(f"# A\n{numbers.BEGIN}\n{numbers.END}\n")
    (tmp_path / "page.md").write_text(f"{BEGIN}\n{END}\n")
    (tmp_path / "optimizer.json").write_text(json.dumps(steps))
    run = partial(_report, quick, tmp_path, "--numbers", str(page), "--steps", str(tmp_path / "optimizer.json"))
    assert run().exit_code == 0
    assert f"{numbers.BEGIN}\n* **Optimizer step**" in page.read_text()
    assert run("--check").exit_code == 0
    page.write_text(page.read_text().replace("3.3 ×", "3.4 ×"))
    assert run("--check").exit_code == 1


def test_the_gate_runs_what_is_measured() -> None:
    assert all((ROOT / name).exists() for name in program.TESTS)


@pytest.mark.stored
def test_the_page_shows_the_stored_result() -> None:
    page = ROOT / "docs" / "training_cost.md"
    stored = list((ROOT / "bench" / "results").glob("*/training.json"))
    if not stored:
        assert f"{BEGIN}\n{END}" in page.read_text()
        return
    (path,) = stored
    result = json.loads(path.read_text())
    assert not result["quick"]
    assert {row["model"] for row in result["rows"] if row["kind"] == "training"} == MODELS.keys()
    (steps,), (gain,) = ((ROOT / "bench" / "results").glob(f"*/{name}.json") for name in ("optimizer", "dial"))
    readme = ["--numbers", str(ROOT / "README.md"), "--steps", str(steps), "--gain", str(gain)]
    found = CliRunner().invoke(report.main, [str(path), "--check", *readme])
    assert found.exit_code == 0, found.output
