"""The benchmark for a device, without one: clocks, the gate, what is measured and written, and the tables it ends up in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bench.byte_model import OPS
from bench.gpu import gate, sanitize, summary, sweep, timing
from bench.gpu.__main__ import main
from bench.gpu.launches import activity_of
from bench.gpu.steps import COMBINATIONS, GRAPH, LOOPS, REFERENCE
from bench.gpu.timing import Timed
from bench.gpu.workloads import GPU_WORKLOADS
from bench.report import BEGIN, END
from bench.report import main as report
from tests.bench.test_bench_cli import ROW_KEYS

ROOT = Path(__file__).parents[2]


class FakeClock:
    """Each call has its time; the log says who had a turn."""

    def __init__(self, milliseconds: Callable[[], float]) -> None:
        self.milliseconds = milliseconds
        self.turns: list[tuple[int, int]] = []

    def turn(self, call: Callable[[], object], samples: int, inner: int, host_seconds: float) -> Timed:
        call()
        self.turns.append((samples, inner))
        return Timed([self.milliseconds()] * samples, [0.01])


# --- timing ---


def test_every_round_gives_each_call_a_turn_and_short_calls_more_than_one_go() -> None:
    log: list[str] = []
    clock = FakeClock(lambda: {"short": 0.01, "long": 5.0}[log[-1]])
    found = timing.interleave(clock, {name: lambda name=name: log.append(name) for name in ("short", "long")}, seconds=0.1, rounds=(4, 6))
    assert {name: len(timed.device_ms) for name, timed in found.items()} == {"short": 6 * 3, "long": 6 * 3}
    assert found["long"].device.ms_50 == 5.0
    assert {inner for _, inner in clock.turns[-12:]} == {timing.MAX_INNER, 1}


def test_settling_ends_when_two_turns_agree_or_after_the_last() -> None:
    falling = iter([100.0, 50.0, 10.0, 10.1, 9.0])
    clock = FakeClock(lambda: next(falling))
    assert timing.settle(clock, lambda: None).device.ms_50 == 10.1
    doubling = iter(2.0**i for i in range(100))
    clock = FakeClock(lambda: next(doubling))
    timing.settle(clock, lambda: None, most=5)
    assert len(clock.turns) == 5


def test_the_device_clock_fills_the_queue_and_reads_events_after_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that runs behind the host: an event's time is when the work before it is done."""
    log: list[str] = []
    now = {"device": 0.0}

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")
            self.at = now["device"]

        def elapsed_time(self, other: Event) -> float:
            assert log[-1] == "synchronize"
            return other.at - self.at

    def call() -> None:
        log.append("call")
        now["device"] += 2.0

    def sleep(cycles: int) -> None:
        log.append("sleep")
        now["device"] += 1000.0
        assert 0 < cycles <= timing.SLEEP_LIMIT * timing.CYCLES_PER_SECOND

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    timed = timing.DeviceClock().turn(call, 3, 2, 10.0)
    assert timed.device_ms == [2.0] * 3
    assert len(timed.host_ms) == 1
    assert log == ["synchronize", "sleep", "record", *(["call", "call", "record"] * 3), "synchronize"]


# --- launches ---


def test_ranges_with_a_name_are_no_kernels() -> None:
    def event(name: str, device: Any = torch.autograd.DeviceType.CUDA, annotation: bool = False) -> Any:
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation)

    fill = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1> >(int)"
    events = [
        event("_norm_kernel"), event("_norm_kernel"), event(fill), event("Memcpy HtoD (Pinned -> Device)"), event("Memset (Device)"),
        event("Optimizer.step#SAM.step"), event("anything", annotation=True), event("cudaLaunchKernel", torch.autograd.DeviceType.CPU),
    ]  # fmt: skip
    activity = activity_of(events)
    assert (len(activity.kernels), len(activity.copies), len(activity.fills)) == (3, 1, 1)
    assert str(activity).startswith("3 kernels: _norm_kernel × 2, vectorized_elementwise_kernel[Fill]; 1 copies: ")


# --- the gate ---


def junit(path: Path, cases: dict[str, str]) -> Path:
    bodies = [f'<testcase classname="tests.gpu.test_against_reference" name="{name}">{inner}</testcase>' for name, inner in cases.items()]
    path.write_text(f"<testsuites><testsuite>{''.join(bodies)}</testsuite></testsuites>")
    return path


def test_the_gate_opens_operation_by_operation(tmp_path: Path) -> None:
    name = "test_matches_the_reference[{}]"
    cases = {
        name.format("perturb_-sam-triton"): "",
        name.format("perturb_-usam-triton"): "<failure message='2 wrong'/>",
        name.format("perturb_-sam-foreach"): "",
        name.format("restore_-restore-triton"): "",
        name.format("sgd_step_-momentum-triton"): "<skipped/>",
        "test_every_half_is_read_exactly[bf16]": "<failure/>",
    }
    found = gate.read(junit(tmp_path / "tests.xml", cases))
    assert found.green == {("perturb_", "foreach"), ("restore_", "triton")}
    assert found.line == f"failed: {gate.TESTS}: 3 passed, 1 failed"
    assert found.allows("perturb_", "torch")
    assert found.refused(["perturb_", "sgd_step_"], ["triton", "foreach", "torch"]) == [
        "perturb_ on triton",
        "sgd_step_ on triton",
        "sgd_step_ on foreach",
    ]
    assert not gate.read(tmp_path / "missing.xml").allows("restore_", "triton")
    del cases[name.format("perturb_-usam-triton")]
    assert gate.read(junit(tmp_path / "tests.xml", cases)).line.startswith("passed")


def test_the_gate_knows_the_names_of_the_tests() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", gate.TESTS]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    found = {(match["op"], match["backend"]) for match in map(gate._ID.search, names) if match}
    assert found >= {(op, backend) for op in OPS for backend in ("triton", "foreach")}


@pytest.mark.parametrize(
    ("code", "output", "is_error"),
    [
        (0, "24 calls\n========= ERROR SUMMARY: 0 errors\n", False),
        (sanitize.ERRORS_FOUND, "Invalid __global__ write of size 4\n========= ERROR SUMMARY: 3 errors\n", True),
        (1, "========= Error: Device not supported\n", False),
        (None, "", False),
    ],
)
def test_only_errors_found_count_against_us(code: int | None, output: str, is_error: bool) -> None:
    words, found = sanitize.verdict(code, output)
    assert found is is_error
    assert words


# --- the sweep ---


def test_the_fastest_cut_wins_and_a_lucky_sample_does_not() -> None:
    winner, lucky = sweep.Choice(16384, 2048, 8), sweep.Choice(4096, 512, 4)

    def times(choice: sweep.Choice, samples: int) -> float:
        if choice == lucky:
            return 0.1 if samples == 5 else 9.0
        return 1.0 if choice == winner else 2.0 + choice.chunk / 1e6

    ranked = sweep.best(times, sweep.choices(), lambda: False)
    assert ranked[0] == (winner, 1.0)
    assert len(ranked) == sweep.WINNERS
    assert lucky not in dict(ranked)
    assert sweep.best(times, sweep.choices(), lambda: True) == []


def test_choices_are_what_the_kernels_take() -> None:
    assert len(set(sweep.choices())) == len(sweep.choices()) == 40
    assert all(choice.chunk % choice.block == 0 for choice in sweep.choices())


def test_a_sweep_leaves_the_configuration_as_it_was() -> None:
    pytest.importorskip("triton")
    configs = sweep._configs()
    before = dict(configs)
    clock = FakeClock(lambda: 1.0 + abs(configs["perturb"].chunk - 32768) + configs["perturb"].block / 1e6)
    rows = sweep.run(clock, "cpu", gate.Gate("", frozenset({("perturb_", "triton")})), 1e18, dtypes=["fp32"])
    assert configs == before
    assert {row["kernel"] for row in rows} == {"perturb"}
    assert (rows[0]["chunk"], rows[0]["block"]) == (32768, 512)
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
    assert sum(row["is_default"] for row in rows) == 1
    assert len(sweep.lines(rows)) == 2


# --- what is written, and the tables ---


def test_workloads_have_the_size_of_the_models() -> None:
    assert {name: (w.n_tensors, w.numel) for name, w in GPU_WORKLOADS.items()} == {
        "one_1e8": (1, 10**8),
        "gpt2_124m": (148, 124_439_808),
        "resnet50": (161, 25_557_032),
        "many_tiny": (1000, 3000),
        "one_1e9": (1, 10**9),
    }


def test_dry_run_end_to_end(tmp_path: Path) -> None:
    arguments = ["--dry-run", "--out", str(tmp_path), "--workload", "many_tiny", "--dtype", "fp32", "--ops", "restore_,grad_norm"]
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 0, run.output
    result = json.loads((tmp_path / "default.json").read_text())
    assert {"schema", "gpu", "driver", "cuda", "torch", "triton", "clocks", "device", "gate", "bandwidth"} <= set(result)
    assert set(result["bandwidth"]) == {"copy", "read", "write"}
    assert all(set(row) >= ROW_KEYS | {"host_us", "pct_copy"} for row in result["rows"])
    assert {row["op"] for row in result["rows"] if row["kind"] == "op"} == {"restore_", "grad_norm"}
    steps = {(row["base"], row["backend"]): row for row in result["rows"] if row["kind"] == "step"}
    assert set(steps) == {(base, name) for base in ("sgd", "adamw") for name in (REFERENCE, *LOOPS)}
    assert steps["sgd", LOOPS[0]]["reference_ms_50"] == steps["sgd", REFERENCE]["ms_50"]


def test_what_does_not_fit_the_time_is_named(tmp_path: Path) -> None:
    arguments = ["--dry-run", "--out", str(tmp_path), "--workload", "many_tiny", "--dtype", "bf16", "--ops", "restore_", "--budget", "0"]
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 0, run.output
    assert "left out: restore_ many_tiny bf16: out of time" in run.output
    assert "left out: steps of adamw many_tiny bf16: out of time" in run.output


def test_without_a_device_nothing_is_measured(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    run = CliRunner().invoke(main, ["--out", str(tmp_path)])
    assert run.exit_code == 1
    assert "no CUDA device" in run.output
    assert CliRunner().invoke(main, ["--workload", "resnet19"]).exit_code == 2


def full_result() -> dict[str, Any]:
    """As a device with every backend would give."""
    rows: list[dict[str, Any]] = []
    times = {"ms_20": 0.9, "ms_80": 1.1, "host_us": 80.0, "gbps": 2700.0, "pct_copy": 90.0}
    for workload in GPU_WORKLOADS:
        for dtype in ("fp32", "bf16"):
            for op in OPS:
                case = {"kind": "op", "op": op, "workload": workload, "dtype": dtype, "base": None}
                rows += [case | times | {"backend": name, "ms_50": ms} for name, ms in (("triton", 1.0), ("foreach", 3.0), ("torch", 1.5))]
        for base, dtype in COMBINATIONS:
            case = {"op": "step", "workload": workload, "dtype": dtype, "base": base}
            providers = ((REFERENCE, 2.0), (GRAPH, 1.9), (LOOPS[0], 8.0), (LOOPS[1], 5.0))
            rows += [{"kind": "step"} | case | times | {"backend": name, "ms_50": ms} for name, ms in providers]
            counts = {"kernels": 5, "copies": 0, "fills": 1, "names": "5 kernels: _norm_kernel × 2"}
            rows.append({"kind": "launches"} | case | {"backend": REFERENCE} | counts)
    bandwidth = {kind: {"gbps": 3000.0, "by": "x"} for kind in ("copy", "read", "write")}
    where = {"schema": 1, "device": "some-gpu", "gpu": "Some GPU", "driver": "1", "cuda": "13.0", "torch": "2.11", "triton": "3.6"}
    return where | {"commit": "abc", "dirty": False, "gate": "passed: all", "bandwidth": bandwidth, "rows": rows}


def test_the_last_tables_are_short_and_complete() -> None:
    result = full_result()
    rows = [
        {"kernel": k, "dtype": d, "chunk": 16384, "block": 2048, "num_warps": 4, "ms_50": 1.0 + i, "gbps": 2.0, "is_default": i == 0}
        for k in sweep.KERNELS for d in ("fp32", "bf16") for i in range(4)
    ]  # fmt: skip
    lines = [*summary.bench_lines(result), *sweep.short_lines(rows)]
    assert len(lines) < 60 - 7  # a line a phase
    assert len(sweep.lines(rows)) == 1 + 2 * len(sweep.KERNELS)
    assert sum(map(len, lines)) < 9000
    shown = [(workload, op) for workload in GPU_WORKLOADS for op in OPS if workload == summary.FULL or op in summary.OF_STEPS]
    assert all(any(line.startswith(f"{workload:<10} {op}") for line in lines) for workload, op in shown)
    step = next(line for line in lines if line.startswith("many_tiny  sgd  "))
    assert step.split()[3:] == ["2.0000", "80", "1.9000", "4.0×", "2.5×", "5", "0", "1"]


def test_reports_take_results_of_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n")
    (tmp_path / "default.json").write_text(json.dumps(full_result()))
    swept = {
        "kind": "sweep",
        "op": "grad_norm",
        "kernel": "norm",
        "dtype": "fp32",
        "chunk": 16384,
        "block": 2048,
        "num_warps": 4,
        "is_default": True,
    }
    (tmp_path / "sweep.json").write_text(json.dumps(full_result() | {"rows": [swept | {"ms_50": 0.2, "gbps": 2000.0}]}))
    files = [str(tmp_path / name) for name in ("default.json", "sweep.json")]
    targets = ["--readme", tmp_path / "README.md", "--docs", tmp_path / "docs.md", "--image", tmp_path / "a.png"]
    run = CliRunner().invoke(report, [*files, *map(str, targets)])
    assert run.exit_code == 0, run.output
    readme, docs = (tmp_path / "README.md").read_text(), (tmp_path / "docs.md").read_text()
    assert "| ResNet-50, SGD-momentum, fp32 | 2 ms | 90 % | 1.9 ms | 4.0× | 2.5× | 5 |" in readme
    assert readme.count("Some GPU") == 1
    assert "### Operations: 1 × 10⁸, bf16, Some GPU" in docs
    assert "| `sgd_step_` triton | 1 ms | 900 µs – 1.1 ms | 2,700 | 90 % | 80 µs |" in docs
    assert "16,384 / 2,048 / 4, the default" in docs
    assert not (tmp_path / "a.png").exists()
    assert CliRunner().invoke(report, [*files, *map(str, targets), "--check"]).exit_code == 0
