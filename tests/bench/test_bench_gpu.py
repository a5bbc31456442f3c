"""The benchmark for a device, without one: clocks, the gate, what is measured and written. Its tables: test_bench_gpu_tables.py."""

from __future__ import annotations

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
from bench.gpu import gate, products, results, sanitize, stages, sweep, sweep_native, sweep_triton, timing
from bench.gpu.__main__ import MEASURED, main
from bench.gpu.launches import activity_of
from bench.gpu.peers import COPY, FOREACH_COPY, ON_DTENSORS
from bench.gpu.steps import BACKENDS, BASE_ALONE, LOOPS, _forwards, memory_needed, provider
from bench.gpu.timing import Timed
from bench.gpu.workloads import GPU_WORKLOADS
from tests.bench.test_bench_cli import ROW_KEYS

ROOT = Path(__file__).parents[2]


class FakeClock:
    """Each call has its time; the log says who had a turn."""

    def __init__(self, milliseconds: Callable[[], float]) -> None:
        self.milliseconds = milliseconds
        self.turns: list[tuple[int, int]] = []

    def wait(self) -> None:
        pass

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


class Device:
    """A host with a queue: a call takes ``host`` seconds of it, the work that it leaves behind ``device`` seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.busy_until = 0.0
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)

    def call(self, host: float, device: float) -> Callable[[], None]:
        def run() -> None:
            self.now += host
            self.busy_until = max(self.busy_until, self.now) + device

        return run

    def wait(self) -> None:
        self.now = max(self.now, self.busy_until)


def test_a_loop_takes_as_long_as_the_slower_of_host_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Device(monkeypatch)
    clock: Any = SimpleNamespace(wait=machine.wait)
    calls = {"host-bound": machine.call(0.010, 0.001), "device-bound": machine.call(0.001, 0.010)}
    expected = {"host-bound": Timed([1.0], [10.0]), "device-bound": Timed([10.0], [1.0])}
    found = timing.wall_ms(clock, calls, expected)
    assert found["host-bound"] == pytest.approx(10.0 + 1.0 / 2)  # two calls a turn: the device's last work is waited for
    assert found["device-bound"] == pytest.approx(10.0 + 1.0 / 2)
    assert timing.launch_us(clock, calls) == {"host-bound": pytest.approx(10_000), "device-bound": pytest.approx(1_000)}


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


def of_test(name: str, outcome: str = "passed") -> dict[str, Any]:
    return {"kind": "test", "name": f"tests/gpu/test_against_reference.py::{name}", "outcome": outcome}


def test_the_gate_opens_operation_by_operation() -> None:
    name = "test_matches_the_reference[{}]"
    red = of_test(name.format("perturb_-usam-triton"), "failed")
    rows = [
        of_test(name.format("perturb_-sam-triton")),
        of_test(name.format("perturb_-sam-foreach")),
        of_test(name.format("restore_-restore-triton")),
        of_test(name.format("sgd_step_-momentum-triton"), "skipped"),
        of_test("test_every_half_is_read_exactly[bf16]", "failed"),
        {"kind": "test", "name": "smoke[grad_norm-plain-native]", "op": "grad_norm", "backend": "native", "outcome": "passed"},
        {"kind": "phase", "name": "triton", "state": "ok"},
    ]
    found = gate.read([*rows, red])
    assert found.green == {("perturb_", "foreach"), ("restore_", "triton"), ("grad_norm", "native")}
    assert found.line == "failed: tests against the reference: 4 passed, 1 failed"
    assert found.allows("perturb_", "torch")
    assert found.refused(["perturb_", "sgd_step_"], ["triton", "foreach", "torch"]) == [
        "perturb_ on triton",
        "sgd_step_ on triton",
        "sgd_step_ on foreach",
    ]
    assert not gate.read([]).allows("restore_", "triton")
    assert gate.read([]).line.startswith("failed")
    assert gate.read(rows).line.startswith("passed: ")
    late = gate.read([*rows, {"kind": "phase", "name": "native", "state": "cut off after 90 s"}])
    assert late.line.startswith("passed until native was cut off: ")
    assert late.allows("restore_", "triton")


def test_few_rows_say_the_same_to_the_gate() -> None:
    rows = [of_test(f"test_matches_the_reference[perturb_-option{i}-triton]") for i in range(500)]
    rows += [of_test("test_matches_the_reference[restore_-restore-native]", "failed"), {"kind": "phase", "name": "x", "state": "cut off"}]
    few = gate.condensed(rows)
    assert len(few) == 3
    assert gate.read(few) == gate.read(rows)


def test_the_gate_knows_the_names_of_the_tests() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", gate.TESTS]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    found = {(match["op"], match["backend"]) for match in map(gate._ID.search, names) if match}
    assert found >= {(op, backend) for op in OPS for backend in (*BACKENDS, "foreach")}


FOUND = sanitize.ERRORS_FOUND
UNINITIALIZED = "========= Uninitialized __global__ memory read of size 4 bytes\n=========   at "


@pytest.mark.parametrize(
    ("tool", "code", "output", "is_error"),
    [
        ("memcheck", 0, "24 calls\n========= ERROR SUMMARY: 0 errors\n", False),
        ("memcheck", FOUND, "Invalid __global__ write of size 4\n========= ERROR SUMMARY: 3 errors\n", True),
        ("memcheck", None, "Invalid __global__ write of size 4\n", True),
        ("memcheck", 1, "========= Error: Device not supported\n", False),
        ("memcheck", None, "", False),
        ("racecheck", 0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", False),
        ("racecheck", FOUND, "========= Error: Race reported between Write access at void sam::cuda::chunk_kernel<\n", True),
        (
            "initcheck",
            FOUND,
            UNINITIALIZED + "void sam::cuda::chunk_kernel<\n",
            True,
        ),
        ("initcheck", FOUND, UNINITIALIZED + "_sgd_kernel+0x80\n", True),
        (
            "initcheck",
            FOUND,
            UNINITIALIZED + "void at::native::a_kernel<\n",
            False,
        ),
    ],
)
def test_only_errors_found_in_our_kernels_count_against_us(tool: str, code: int | None, output: str, is_error: bool) -> None:
    words, found = sanitize.verdict(tool, code, output)
    assert found is is_error
    assert (words == "clean") == (code == 0)


# --- the sweep ---


def test_the_fastest_cut_wins_and_a_lucky_sample_does_not() -> None:
    winner, lucky = sweep_triton.Choice(16384, 2048, 8), sweep_triton.Choice(8192, 512, 4)

    def times(choice: sweep_triton.Choice, samples: int) -> float:
        if choice == lucky:
            return 0.1 if samples == 5 else 9.0
        return 1.0 if choice == winner else 2.0 + choice.chunk / 1e6

    choices = sweep_triton.choices("norm")
    ranked = sweep.best(times, choices, lambda: False)
    assert ranked[0] == (winner, 1.0)
    assert len(ranked) == sweep.WINNERS
    assert lucky not in dict(ranked)
    assert sweep.best(times, choices, lambda: True) == []


def test_choices_are_what_the_kernels_take() -> None:
    for kernel, count in (("norm", 24), ("random", 12)):
        found = sweep_triton.choices(kernel)
        assert len(set(found)) == len(found) == count
        assert all(choice.chunk % choice.block == 0 for choice in found)
    found_native = sweep_native.choices("norm")
    assert len(set(found_native)) == len(found_native) == 20
    assert all(choice.chunk_size % 1024 == 0 for choice in found_native)  # set_cut refuses others


def test_a_sweep_leaves_the_configuration_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    configs = sweep_triton._config().CONFIGS
    before = dict(configs)
    clock = FakeClock(lambda: 1.0 + abs(configs["perturb"].chunk - 32768) + configs["perturb"].block / 1e6)
    monkeypatch.setattr(sweep, "tuners", lambda: [sweep_triton])
    rows = list(sweep.run(clock, "cpu", gate.Gate("", frozenset({("perturb_", "triton")})), 1e18, dtypes=["fp32"]))
    assert configs == before
    assert {row["kernel"] for row in rows} == {"perturb"}
    assert (rows[0]["cut"], rows[0]["chunk"], rows[0]["block"]) == ("32k/512/4", 32768, 512)
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
    assert sum(row["is_default"] for row in rows) == 1
    assert len(sweep.lines(rows)) == 2


def test_a_sweep_of_the_cuda_kernels_sets_their_cut_and_resets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = {"chunk_size": 65536, "blocks_per_processor": 0}
    cut = dict(usual)
    module = SimpleNamespace(usual_chunk_size=lambda numels: 65536, set_cut=lambda **given: cut.update(given or usual))
    monkeypatch.setattr(sweep_native, "_module", lambda: module)
    monkeypatch.setattr(sweep, "tuners", lambda: [sweep_native])
    clock = FakeClock(lambda: 1.0 + abs(cut["chunk_size"] - 32768) + abs(cut["blocks_per_processor"] - 4))
    rows = list(sweep.run(clock, "cpu", gate.Gate("", is_off=True), 1e18, dtypes=["fp32", "bf16"]))
    assert {(row["kernel"], row["dtype"]) for row in rows} == {(kernel, dtype) for kernel in sweep.KERNELS for dtype in ("fp32", "bf16")}
    assert {row["cut"] for row in rows if row["rank"] == 1} == {"32k/4"}
    assert {row["cut"] for row in rows if row["is_default"]} == {"64k/all"}
    assert cut == usual


# --- what is written, and the tables ---


def test_workloads_have_the_size_of_the_models() -> None:
    assert {name: (w.n_tensors, w.numel) for name, w in GPU_WORKLOADS.items()} == {
        "one_1e8": (1, 10**8),
        "gpt2_124m": (148, 124_439_808),
        "resnet18": (62, 11_689_512),
        "resnet50": (161, 25_557_032),
        "many_tiny": (1000, 3000),
        "one_1e9": (1, 10**9),
    }


def test_dry_run_end_to_end(tmp_path: Path) -> None:
    arguments = ["--dry-run", "--out", str(tmp_path), "--workload", "many_tiny", "--dtype", "fp32", "--ops", "restore_,grad_norm"]
    arguments += ["--stages", ",".join(name for name in MEASURED if name != "training")]  # test_bench_gpu_training.py
    (tmp_path / "bench.jsonl").write_text('{"kind": "op"}\n')  # of an earlier run
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 0, run.output
    result = results.read(tmp_path / "bench.jsonl")
    assert {"schema", "gpu", "driver", "cuda", "torch", "triton", "clocks", "device", "gate", "bandwidth"} <= set(result)
    assert set(result["bandwidth"]) == {"copy", "read", "write"}
    assert all(set(row) >= ROW_KEYS | {"host_us", "pct_copy"} for row in result["rows"] if row["kind"] in ("op", "step"))
    assert {row["op"] for row in result["rows"] if row["kind"] == "op"} == {"restore_", "grad_norm"}
    steps = {(row["base"], row["backend"]): row for row in result["rows"] if row["kind"] == "step"}
    ours = [provider(backend) for backend in BACKENDS]
    needed = {(base, name) for base in ("sgd", "adamw") for name in (*ours, *LOOPS, BASE_ALONE, COPY, FOREACH_COPY)}
    assert set(steps) >= needed | {("adamw", name) for name in ON_DTENSORS.values()}
    assert steps["sgd", LOOPS[0]]["reference_ms_50"] == steps["sgd", ours[0]]["ms_50"]
    assert all(row["loops"][name] == steps[base, name]["wall_ms"] for (base, _), row in steps.items() for name in LOOPS)
    assert {(row["op"], row["base"]) for row in result["rows"] if row["kind"] == "dispatch"} >= {("step", "sgd"), ("step", "adamw")}
    rows = [row for row in result["rows"] if row["kind"] == "product"]
    assert {row["backend"] for row in rows} == {"triton, gram", "triton, direct", *products.BASELINES}
    assert {row["dtype"] for row in rows} == {"tf32", "ieee"}  # bf16 was not asked for
    assert run.output.count("not measured") > len(OPS)  # the bars come last, whatever was measured


def test_a_step_forwards_leaves_the_usual_order(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, bool]] = []
    backend = SimpleNamespace(_cuda=SimpleNamespace(set_cut=lambda **given: told.append(given)))
    monkeypatch.setitem(sys.modules, "sam_kernels.backends.native.cuda", backend)
    _forwards(lambda: told.append({"step": True}))()
    assert told == [{"backwards": False}, {"step": True}, {}]


def test_the_largest_step_fits_an_h100() -> None:
    """78 GiB, with room for the context. AdamW's only with one of our optimizers at a time."""
    room = 0.92 * 77 * 2**30
    needed = {
        (base, len(few)): memory_needed(GPU_WORKLOADS["one_1e9"], base, "fp32", few)
        for base in ("sgd", "adamw")
        for few in (["native"], BACKENDS)
    }
    assert [case for case, nbytes in needed.items() if nbytes > room] == [("adamw", 2)]


def test_what_does_not_fit_the_time_is_named(tmp_path: Path) -> None:
    arguments = ["--dry-run", "--out", str(tmp_path), "--workload", "many_tiny", "--dtype", "bf16", "--ops", "restore_", "--budget", "0"]
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 0, run.output
    assert [f"left out: stage {stage.name}: out of time" in run.output for stage in stages.STAGES] == [True] * 9 + [False] * 2


def test_without_a_device_nothing_is_measured(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    run = CliRunner().invoke(main, ["--out", str(tmp_path)])
    assert run.exit_code == 1
    assert "no CUDA device" in run.output
    assert CliRunner().invoke(main, ["--workload", "resnet19"]).exit_code == 2
