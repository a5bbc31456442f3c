"""``make gpu`` as a whole, its phases replaced by short ones: whatever goes wrong, there are rows in a file and a verdict."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bench.gpu import build, calls, carry, closing, gate, phases, run, sanitize, smoke, stages
from bench.gpu.phases import Outcome, Phase
from bench.gpu.record import BENCH, LOG, SUMMARY, TESTS, row_of

GPU = {"kind": "run", "gpu": "Some GPU", "gate": "passed: all", "bandwidth": {"copy": {"gbps": 3000.0, "by": "copy_"}}}
TESTED = {"kind": "test", "name": "smoke[restore_-restore-native]", "op": "restore_", "backend": "native", "outcome": "passed"}


SIZE = {"bytes": 8 * 10**8, "copy_gbps": 4_000.0, "issue_ms": 0.01}


def op_row(i: int = 0) -> dict[str, Any]:
    case = {"kind": "op", "op": "restore_", "workload": "one_1e8", "dtype": "fp32", "base": None, "backend": "native"}
    return case | {"ms_50": 0.2, "host_us": 8.0, "gbps": 4000.0, "pct_copy": 93.5, "samples": i} | SIZE


def shows_the_row(output: str) -> bool:
    return any(line.startswith("one_1e8   restore_ ") and "0.2000  94%" in line for line in output.splitlines())


def prints(name: str, rows: list[dict[str, Any]], then: str = "", after: tuple[str, ...] = (), **options: Any) -> Phase:
    code = f"import time\nprint({''.join(json.dumps(row) + chr(10) for row in rows)!r}, end='', flush=True)\n{then}"
    return Phase(name, (sys.executable, "-c", code), options.pop("seconds", 20.0), {}, after, **options)


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs ``make gpu`` on these phases."""
    monkeypatch.setattr(phases, "GRACE", 1.0)

    def simulated(*wave: Phase, out: Path = tmp_path / "out") -> Result:
        monkeypatch.setattr(calls, "phases", lambda plan, say: list(wave))
        return CliRunner().invoke(run.main, ["--out", str(out)])

    return simulated


def test_rows_of_a_benchmark_that_is_cut_off_make_a_verdict(simulate: Any, tmp_path: Path) -> None:
    result = simulate(
        prints("build", [], "print('_cuda and _cpu were carried here and fit')"),
        prints("smoke", [TESTED], after=("build",)),
        prints("bench", [GPU, op_row()], "print('left out: sgd_step_: out of time', flush=True)\ntime.sleep(60)", ("smoke",), seconds=1.5),
    )
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [json.loads(line) for line in (tmp_path / "out" / BENCH).read_text().splitlines()] == [GPU, op_row()]
    assert json.loads((tmp_path / "out" / TESTS).read_text().splitlines()[1]) == TESTED
    assert any(line.startswith("build      ok, ") and line.endswith("_cuda and _cpu were carried here and fit") for line in lines)
    assert any(line.startswith("smoke      ok, ") and line.endswith(": 1 passed") for line in lines)
    assert any(line.startswith("bench      cut off after ") and line.endswith(": 2 rows, 1 left out (log.txt says why)") for line in lines)
    assert shows_the_row(result.output)
    assert lines[-1].startswith("green; cut off or left out: bench; results in ")
    assert "left out: sgd_step_" in (tmp_path / "out" / LOG).read_text()
    assert (tmp_path / "out" / SUMMARY).read_text().splitlines()[-1] == lines[-1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {BENCH, TESTS, LOG, SUMMARY}


def test_who_ends_the_run_gets_the_tables_of_what_there_is(simulate: Any, tmp_path: Path) -> None:
    ends = f"import os, signal\ntime.sleep(1)\nos.kill({os.getpid()}, signal.SIGTERM)\ntime.sleep(60)"
    result = simulate(prints("smoke", [TESTED]), prints("bench", [GPU, op_row()], ends, ("smoke",)), prints("sweep", [], after=("bench",)))
    assert result.exit_code == 0, result.output
    assert "interrupted: bench, sweep did not end" in result.output
    assert shows_the_row(result.output)
    assert "; cut off or left out: bench, sweep; results in " in result.output.splitlines()[-1]
    assert json.loads((tmp_path / "out" / BENCH).read_text().splitlines()[1]) == op_row()


def test_a_full_disk_costs_rows_in_the_file_and_none_in_the_verdict(simulate: Any, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        last = op_row() | {"dtype": "bf16"}
        result = simulate(prints("smoke", [TESTED]), prints("bench", [GPU, *map(op_row, range(200)), last], after=("smoke",)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.exit_code == 0, result.output
    kept = (tmp_path / "out" / BENCH).read_text().splitlines()
    assert [json.loads(line) for line in kept[:-1]] == [GPU, *map(op_row, range(len(kept) - 2))]
    assert 20 < len(kept) < 200
    assert result.output.count("bench.jsonl cannot be written") == 1
    assert any(line.count("0.2000  94%") == 2 for line in result.output.splitlines())  # the last row too


def test_a_folder_that_is_a_file_stops_nothing(simulate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "file").write_text("")
    result = simulate(prints("bench", [GPU, op_row()]), out=tmp_path / "file")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'file'} cannot be written (File exists): results go to a temporary folder" in result.output
    (instead,) = tmp_path.glob("sam_kernels-*")
    assert result.output.splitlines()[-1] == f"green; results in {instead}"
    assert json.loads((instead / BENCH).read_text().splitlines()[1]) == op_row()


def test_what_is_red_is_named_and_its_end_is_shown(simulate: Any) -> None:
    red = TESTED | {"outcome": "failed", "words": "2 ulp off"}
    long = "for i in range(300): print('x' * 500)\nprint('the reason')\nraise SystemExit(1)"
    result = simulate(
        prints("smoke", [TESTED, red], "raise SystemExit(1)"),
        *(prints(name, [], long) for name in ("triton", "native", "device", "bits")),
        prints("bench", [GPU, op_row()], after=("smoke", "triton", "native", "device", "bits")),
    )
    assert result.exit_code == 1
    assert "smoke      failed (exit code 1), " in result.output
    assert "1 passed, 1 failed: smoke[restore_-restore-native]" in result.output
    assert "native | the reason" in result.output
    assert result.output.splitlines()[-1].startswith("RED: smoke, triton, native, device, bits; results in ")
    assert len(result.output) < 12_000
    assert shows_the_row(result.output)


def outcome(name: str, code: int | None, *rows: dict[str, Any], lines: tuple[str, ...] = ()) -> Outcome:
    return Outcome(Phase(name, ("x",), 1.0), code, 1.0, lines, rows)


def test_red_is_what_a_test_found() -> None:
    red = TESTED | {"outcome": "failed"}
    assert [closing.is_red(outcome("native", code, TESTED)) for code in (0, 1, 5, None)] == [False, True, False, False]
    assert closing.is_red(outcome("native", None, red))
    assert not closing.is_red(outcome("bench", 1))
    assert closing.is_red(outcome("memcheck", 77, lines=("Invalid __global__ write of size 4",)))
    assert not closing.is_red(outcome("memcheck", 1, lines=("Device not supported",)))
    assert closing.failure_lines(outcome("bench", 1, lines=("a", "", "b"))) == ["  bench | a", "  bench | b"]
    assert closing.failure_lines(outcome("native", None, lines=("a",))) == []


def test_a_line_of_a_phase_names_what_it_left_out() -> None:
    line = closing.phase_line(outcome("smoke", 0, TESTED, lines=("left out: backend native: not built", "triton: 3.6")))
    assert line == "smoke      ok, 1 s: 1 passed; left out: backend native: not built"
    assert closing.phase_line(outcome("bench", 1, lines=("", " "))) == "bench      failed (exit code 1), 1 s"
    assert closing.phase_line(outcome("bench", None)) == "bench      cut off after 1 s"


def test_a_row_that_no_table_understands_costs_one_table(simulate: Any) -> None:
    odd = {"kind": "step", "workload": "one_1e8", "base": "sgd", "dtype": "fp32", "backend": "sam_kernels/native", "wall_ms": 1.0}
    result = simulate(prints("bench", [GPU, op_row(), odd | {"op": "step"}]))
    assert result.exit_code == 0, result.output
    assert "left out: a table: KeyError" in result.output
    assert result.output.splitlines()[-1].startswith("green; results in ")


def plan(*chosen: str, **more: Any) -> calls.Plan:
    now = time.monotonic()
    return calls.Plan(chosen, ("bars",), now, now + 200, **{"tests": lambda: [TESTED], **more})


@pytest.fixture
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "is_there", lambda: False)
    monkeypatch.setattr(calls, "device_name", lambda: "Some GPU")
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: f"/bin/{name}")


@pytest.mark.usefixtures("_device")
def test_three_calls_are_everything_and_fit_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "is_there", lambda: True)
    assert {name for call in calls.CALLS.values() for name in call.phases} == set(calls.PHASES)
    assert calls.CALLS[1].stages == calls.ALL
    assert set(calls.CALLS[1].stages) | set(stages.SWEEPS) == {stage.name for stage in stages.STAGES}
    assert set(calls.FIRST) | set(calls.CALLS[2].stages) == set(calls.ALL)
    assert run.TOTAL + 2 * phases.GRACE <= 230
    for call in calls.CALLS.values():
        given = plan(*call.phases)
        found = calls.phases(given, pytest.fail)
        names = [phase.name for phase in found]
        assert names[:2] == ["build", "smoke"]
        assert all(min(phase.until, given.start + phase.seconds) <= given.end for phase in found[2:])
        assert found[1].after == ("build",)
        assert all(set(phase.after) >= {"build", "smoke"} for phase in found[2:])
        measured = [phase for phase in found if phase.name in ("bench", "sweep")]
        assert [set(phase.after) for phase in measured] == [set(names) - {phase.name} for phase in measured]


@pytest.mark.usefixtures("_device")
def test_carried_modules_are_looked_at_by_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_there, names in ((True, ["build", "smoke"]), (False, ["smoke"])):
        monkeypatch.setattr(carry, "is_there", lambda is_there=is_there: is_there)
        assert [phase.name for phase in calls.phases(plan("smoke"), pytest.fail)] == names


@pytest.mark.usefixtures("_device")
def test_the_tests_of_all_phases_are_all_there_are() -> None:
    found = {phase.name: phase.command for phase in calls.phases(plan("values", "behaviour"), pytest.fail)}
    assert set(found) == set(calls.TESTS) - {"smoke"}
    assert {name: command[command.index("-k") + 1] for name, command in found.items() if "-k" in command} == {
        "triton": "(triton or foreach)", "native": "not (triton or foreach)",
    }  # fmt: skip
    elsewhere = {word.removeprefix("--ignore=") for word in found["device"] if word.startswith("--ignore=")}
    assert elsewhere == {word for name, command in found.items() if name != "device" for word in command if word.startswith("tests/")}
    assert all("bench.gpu.pytest_rows" in command for command in found.values())


@pytest.mark.usefixtures("_device")
def test_the_benchmark_is_given_the_tests_of_this_call() -> None:
    (bench,) = calls.phases(plan("bench"), pytest.fail)
    assert bench.stdin is not None
    given = [json.loads(line) for line in bench.stdin().splitlines()]
    assert gate.read(given).green == {("restore_", "native")}
    assert {"--out=-", "--tests=-", "--stages=bars"} < set(bench.command)
    (until,) = (float(word.partition("=")[2]) for word in bench.command if word.startswith("--until="))
    assert 200 - calls.MARGIN - 10 < until - time.time() < 200 - calls.MARGIN + 1
    (free,) = calls.phases(plan("bench", tests=None), pytest.fail)
    assert "--no-gate" in free.command
    both = calls.phases(plan("bench", "sweep"), pytest.fail)
    assert both[0].until < both[1].until
    assert both[1].after == ("bench",)


def test_without_a_device_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "device_name", lambda: None)
    monkeypatch.setattr(carry, "is_there", lambda: False)
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    said: list[str] = []
    found = calls.phases(plan(*calls.PHASES), said.append)
    assert [phase.name for phase in found] == ["build", "smoke", "triton", "native", "device", "bits", "per_sample"]
    assert [line.partition(":")[2].split(":")[0].strip() for line in said] == [*sanitize.TOOLS, "bench", "sweep"]
    dry = calls.phases(plan(*calls.PHASES, is_dry_run=True), said.append)
    assert [phase.name for phase in dry] == ["smoke", "triton", "native", "device", "bits", "per_sample", "bench", "sweep"]
    assert all("--dry-run" in phase.command for phase in dry if phase.name in ("smoke", "bench", "sweep"))


def test_every_test_is_a_row_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2, 'two'\n"
        "@pytest.mark.skip(reason='no device')\ndef test_absent(): pass\n"
        "@pytest.fixture\ndef broken(): raise RuntimeError('no memory')\ndef test_broken(broken): pass\n"
    )
    for workers in ([], ["-n", "1"]):
        command = [sys.executable, "-m", "pytest", *gate.PLUGIN, *workers, "--rootdir", str(tmp_path), str(tmp_path)]
        env = {**os.environ, "PYTHONPATH": str(run.ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        rows = {row["name"].rpartition("::")[2]: row for line in done.stdout.splitlines() if (row := row_of(line))}
        outcomes = {"test_good": "passed", "test_bad": "failed", "test_absent": "skipped", "test_broken": "failed"}
        assert {name: row["outcome"] for name, row in rows.items()} == outcomes
        assert rows["test_bad"]["words"].startswith("AssertionError: two")
        assert rows["test_absent"]["words"] == "Skipped: no device"
        assert rows["test_broken"]["words"] == "RuntimeError: no memory"
        assert "1 failed, 1 passed, 1 skipped, 1 error" in done.stdout


# --- building ---


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What setup.py was told, on a machine with a device of capability 9.0 and nvcc, without carried modules."""
    told: list[dict[str, str]] = []
    for name in ("SAM_KERNELS_BUILD", "TORCH_CUDA_ARCH_LIST", "SAM_KERNELS_INSTRUCTION_SETS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(build.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(carry, "has_nvcc", lambda: True)
    monkeypatch.setattr(carry, "reason_unfit", lambda capability: f"there are none for {capability}")
    monkeypatch.setattr(build, "build", lambda env: told.append(dict(env)) or 0)
    return told


NAMES = ("SAM_KERNELS_BUILD", "TORCH_CUDA_ARCH_LIST", "SAM_KERNELS_INSTRUCTION_SETS")


def test_a_build_is_for_this_device_alone(built: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert build.main() == 0
    assert [tuple(env[name] for name in NAMES) for env in built] == [("cuda", "9.0", "baseline")]
    assert capsys.readouterr().out == "carried modules are not used: there are none for 90\n"
    monkeypatch.setenv("SAM_KERNELS_BUILD", "none")  # who says so means it
    assert build.main() == 0
    assert built[1]["SAM_KERNELS_BUILD"] == "none"


def test_carried_modules_that_fit_are_taken(built: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(carry, "reason_unfit", lambda capability: None)
    monkeypatch.setattr(carry, "install", lambda: ["_cuda", "_cpu"])
    assert build.main() == 0
    assert built == []
    assert capsys.readouterr().out == "_cuda and _cpu were carried here and fit\n"


@pytest.mark.parametrize(
    ("missing", "told", "words"),
    [
        ("nvcc", ["cpu"], "no nvcc: put it on PATH or set CUDA_HOME, or carry modules here"),
        ("compiler", [], "no C++ compiler 'c++': install one or set CXX"),
        ("ninja", [], "no ninja: pip install ninja"),
    ],
)
def test_what_a_build_misses_is_said_in_a_line(
    missing: str, told: list[str], words: str, built: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    if missing == "nvcc":
        monkeypatch.setattr(carry, "has_nvcc", lambda: False)
    elif missing == "compiler":
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None if name == missing else object())
    assert build.main() == 1
    assert [env["SAM_KERNELS_BUILD"] for env in built] == told
    said = capsys.readouterr().out.splitlines()
    assert words in said[-1]
    assert said[-1].endswith(build.WITHOUT)


def test_a_build_that_fails_leaves_the_cpus_module(monkeypatch: pytest.MonkeyPatch, built: list[dict[str, str]]) -> None:
    monkeypatch.setattr(build, "build", lambda env: built.append(dict(env)) or 1)
    assert build.main() == 1
    assert [env["SAM_KERNELS_BUILD"] for env in built] == ["cuda", "cpu"]


def test_a_run_without_nvcc_goes_on(simulate: Any, tmp_path: Path) -> None:
    words = f"no nvcc: put it on PATH or set CUDA_HOME; {build.WITHOUT}"
    result = simulate(
        prints("build", [], f"print({words!r})\nraise SystemExit(1)"),
        prints("smoke", [TESTED | {"backend": "triton"}], after=("build",)),
        prints("bench", [GPU, op_row() | {"backend": "triton"}], after=("smoke",)),
    )
    assert result.exit_code == 0, result.output
    assert any(line.startswith("build      failed (exit code 1), ") and line.endswith(words) for line in result.output.splitlines())
    assert len((tmp_path / "out" / BENCH).read_text().splitlines()) == 2
    assert result.output.splitlines()[-1].startswith("green; failed: build; results in ")
    assert shows_the_row(result.output)


# --- smoke ---


def test_smoke_covers_every_operation() -> None:
    rows = list(smoke.rows("foreach", "cpu"))
    ops = {*smoke.OPTIONS, *smoke.SHARPNESS_OPTIONS, *smoke.PER_SAMPLE_OPTIONS}
    assert {row["op"] for row in rows} == ops
    assert {row["outcome"] for row in rows} == {"passed"}
    assert gate.read(rows).green == {(op, "foreach") for op in ops}


def test_smoke_finds_what_is_wrong_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    restore = smoke.check

    def planted(op: str, backends: Any, *arguments: Any, **options: Any) -> Any:
        if op == "restore_":
            raise RuntimeError("illegal memory access")
        found = restore(op, backends, *arguments, **options)
        return {backends[0]: SimpleNamespace(passed=False)} if op == "perturb_" else found

    monkeypatch.setattr(smoke, "check", planted)
    result = CliRunner().invoke(smoke.main, ["foreach", "--dry-run"])
    assert result.exit_code == 1
    rows = [json.loads(line) for line in result.output.splitlines() if line.startswith("{")]
    assert [row["op"] for row in rows if row["outcome"] == "failed"] == ["perturb_", "restore_"]
    assert "smoke[restore_-restore-foreach]: RuntimeError: illegal memory access" in result.output


def test_a_device_that_has_become_unusable_ends_only_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def execv(program: str, arguments: list[str]) -> None:
        started.append(arguments)
        raise SystemExit(9)

    bad = TESTED | {"outcome": "failed", "words": "illegal memory access"}
    monkeypatch.setattr(smoke, "rows", lambda backend, device: iter([bad, TESTED]))
    monkeypatch.setattr(smoke, "reason_missing", lambda backend, device: None)
    monkeypatch.setattr(smoke, "_described", lambda backend, device: "there")
    monkeypatch.setattr(smoke, "_is_usable", lambda device: False)
    monkeypatch.setattr(smoke.os, "execv", execv)
    assert CliRunner().invoke(smoke.main, ["--dry-run"]).exit_code == 9
    assert started[0][1:] == ["-m", "bench.gpu.smoke", "triton", "foreach", "--failed"]
    assert CliRunner().invoke(smoke.main, ["--dry-run", "foreach"]).exit_code == 1
    assert len(started) == 1
