"""``make gpu``: what hangs is ended, what fails is told, what is missing is left out."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.gpu import build, phases, run, sanitize
from bench.gpu.phases import Phase, run_together, xdist_options


def python(name: str, code: str, seconds: float = 20.0, **env: str) -> Phase:
    return Phase(name, (sys.executable, "-c", code), seconds, env)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "GRACE", 1.0)


def test_phases_side_by_side(tmp_path: Path) -> None:
    said: list[str] = []
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    wave = [
        python("good", "import os; print('fine', os.environ['EXTRA'], os.environ['PYTHONPATH'] != '')", EXTRA="given"),
        python("bad", "print('oh no'); raise SystemExit(3)"),
        python("hangs", "print('waiting', flush=True); import time; time.sleep(60)", seconds=1.0),
    ]
    start = time.monotonic()
    good, bad, hangs = run_together(wave, log, said.append, until=start + 30)
    assert time.monotonic() - start < 10
    assert (good.code, good.is_green, good.tail(1)) == (0, True, ["fine given True"])
    assert (bad.code, bad.state) == (3, "failed (exit code 3)")
    assert hangs.code is None
    assert hangs.state.startswith("cut off after 1 s")
    assert hangs.tail(1) != []
    assert {line.partition(":")[0] for line in said} == {"good", "bad", "hangs"}
    text = log.read_text()
    assert text.startswith("before\n")
    assert all(word in text for word in ("fine", "oh no", "waiting"))
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_who_is_cut_off_may_write_what_he_has_and_his_children_end(tmp_path: Path) -> None:
    code = (
        # A process that was started in the background ignores interrupts, and so do its children.
        "import signal\nsignal.signal(2, signal.default_int_handler)\ntry:\n import pathlib, subprocess, sys, time\n"
        " child = subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)'])\n"
        f" pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n time.sleep(60)\n"
        f"except KeyboardInterrupt:\n pathlib.Path({str(tmp_path / 'results')!r}).write_text('written')\n"
    )
    # A busy machine takes a second or two to start two Pythons.
    (outcome,) = run_together([python("slow", code, seconds=4.0)], tmp_path / "log.txt", lambda line: None, until=time.monotonic() + 60)
    assert outcome.code is None
    assert (tmp_path / "results").read_text() == "written"
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child lives on")


def test_a_phase_waits_for_the_one_it_comes_after(tmp_path: Path) -> None:
    def after(name: str, other: str) -> Phase:
        return dataclasses.replace(python(name, f"print({name!r})"), after=other)

    said: list[str] = []
    wave = [after("last", "slow"), after("first", "nowhere"), python("slow", "import time; time.sleep(1); raise SystemExit(1)")]
    outcomes = run_together(wave, tmp_path / "log.txt", said.append, until=time.monotonic() + 30)
    assert [outcome.phase.name for outcome in outcomes] == ["last", "first", "slow"]
    assert [line.partition(":")[0] for line in said] == ["first", "slow", "last"]
    assert [outcome.code for outcome in outcomes] == [0, 0, 1]
    late = run_together(
        [after("late", "slow"), python("slow", "import time; time.sleep(60)")],
        tmp_path / "log.txt",
        said.append,
        until=time.monotonic() + 1,
    )
    assert [(outcome.phase.name, outcome.code) for outcome in late] == [("slow", None)]


def test_nobody_runs_past_the_end_of_all(tmp_path: Path) -> None:
    start = time.monotonic()
    (outcome,) = run_together([python("x", "import time; time.sleep(60)")], tmp_path / "log.txt", lambda line: None, until=start + 0.5)
    assert outcome.code is None
    assert time.monotonic() - start < 10


def test_all_limits_together_are_less_than_eight_minutes(tmp_path: Path) -> None:
    assert run.TOGETHER + run.SECONDS["bench"] + run.SECONDS["sweep"] <= run.TOTAL
    assert run.TOTAL + 2 * 8.0 <= 8 * 60 + 2
    tests = {phase.name: phase for phase in run.test_phases(tmp_path)}
    assert set(tests) == set(run.TESTS)
    assert max(phase.seconds for phase in tests.values()) <= run.TOGETHER
    assert set(run.SECONDS) == {*run.TESTS, *sanitize.TOOLS, "bench", "sweep"}
    # Triton's values need nothing built: compiling them takes longest.
    at_once, later = {"triton": "", "per_sample": ""}, {"native": "build", "values": "native", "device": "build"}
    assert {name: phase.after for name, phase in tests.items()} == at_once | later


def test_workers_leave_cores_to_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases.importlib.util, "find_spec", lambda name: object())
    assert [xdist_options(cores) for cores in (1, 2, 4, 16, 128)] == [[], [], ["-n", "2"], ["-n", "12"], ["-n", "12"]]
    monkeypatch.setattr(phases.importlib.util, "find_spec", lambda name: None)
    assert xdist_options(16) == []


@pytest.mark.parametrize("is_found", [True, False])
def test_workers_are_as_few_as_asked_for(is_found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases.importlib.util, "find_spec", lambda name: object() if is_found else None)
    assert xdist_options(16, most=4) == (["-n", "4"] if is_found else [])


@pytest.mark.parametrize(("exit_code", "is_red"), [(0, False), (1, True), (5, False)])
def test_the_exit_code_is_that_of_the_tests(exit_code: int, is_red: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "test_phases", lambda out: [python("native", f"print('tested'); raise SystemExit({exit_code})")])
    monkeypatch.setattr(run, "device_name", lambda: None)
    result = CliRunner().invoke(run.main, ["tests", "sanitizer", "bench", "sweep", "--out", str(tmp_path)])
    assert result.exit_code == int(is_red), result.output
    assert "native     " + ("ok" if exit_code == 0 else f"failed (exit code {exit_code})") in result.output
    assert "left out: bench: no device" in result.output
    assert all(f"left out: {tool}: no" in result.output for tool in sanitize.TOOLS)
    assert result.output.strip().splitlines()[-1].startswith("RED" if is_red else "green")
    assert "tested" in (tmp_path / "log.txt").read_text()


def test_results_of_an_earlier_run_are_not_taken_for_this_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("native.xml", "default.json", "sweep.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(run, "test_phases", lambda out: [python("native", "print('cut off before it wrote anything')")])
    monkeypatch.setattr(run, "device_name", lambda: None)
    assert CliRunner().invoke(run.main, ["tests", "bench", "sweep", "--out", str(tmp_path)]).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_what_is_measured_knows_the_tests_of_this_run(tmp_path: Path) -> None:
    assert run._gate_arguments(tmp_path, True, True) == [f"--tests={tmp_path / name}.xml" for name in ("native", "triton", "per_sample")]
    assert run._gate_arguments(tmp_path, False, True) == []  # python -m bench.gpu then runs them itself
    assert run._gate_arguments(tmp_path, True, False) == ["--no-gate"]
    command = run.bench_phase("bench", tmp_path, ["--no-gate"]).command
    assert command[1:4] == ("-m", "bench.gpu", "--out")
    assert f"--budget={run.SECONDS['bench'] - run.MARGIN}" in command
    tested = [word for phase in run.test_phases(tmp_path) for word in phase.command]
    assert "tests/gpu" in tested


def test_the_tests_of_two_phases_are_all_there_are(tmp_path: Path) -> None:
    """Values on the device are shared by a word that their names have or have not."""
    words = {phase.name: phase.command[phase.command.index("-k") + 1] for phase in run.test_phases(tmp_path) if "-k" in phase.command}
    assert words == {"triton": "triton or foreach", "native": "not (triton or foreach)"}


def test_a_build_without_its_tools_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None if name == "ninja" else object())
    assert build.build_phases(said.append) == []
    assert said == ["left out: building the native modules: no ninja"]


def test_a_build_is_for_this_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SAM_KERNELS_BUILD", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(build.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(build, "_has_nvcc", lambda: True)
    assert build.settings() == {"SAM_KERNELS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0"}
    monkeypatch.setattr(build, "_has_nvcc", lambda: False)
    assert build.settings()["SAM_KERNELS_BUILD"] == "cpu"
    monkeypatch.setenv("SAM_KERNELS_BUILD", "none")  # who says so means it
    assert "SAM_KERNELS_BUILD" not in build.settings()


@pytest.mark.parametrize(("mode", "built"), [("cuda", ["cuda", "cpu"]), ("cpu", ["cpu"])])
def test_a_build_that_fails_leaves_the_cpus_module(mode: str, built: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def fail(env: dict[str, str]) -> int:
        modes.append(env["SAM_KERNELS_BUILD"])
        return 1

    monkeypatch.setenv("SAM_KERNELS_BUILD", mode)
    monkeypatch.setattr(build, "build", fail)
    assert build.main() == 1
    assert modes == built
