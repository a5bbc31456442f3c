"""``make gpu``: what hangs is ended, what fails is told, what is missing is left out."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.gpu import phases, run
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
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "try:\n    time.sleep(60)\n"
        f"except KeyboardInterrupt:\n    pathlib.Path({str(tmp_path / 'results')!r}).write_text('written')\n"
    )
    (outcome,) = run_together([python("slow", code, seconds=1.5)], tmp_path / "log.txt", lambda line: None, until=time.monotonic() + 30)
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


def test_nobody_runs_past_the_end_of_all(tmp_path: Path) -> None:
    start = time.monotonic()
    (outcome,) = run_together([python("x", "import time; time.sleep(60)")], tmp_path / "log.txt", lambda line: None, until=start + 0.5)
    assert outcome.code is None
    assert time.monotonic() - start < 10


def test_all_limits_together_are_less_than_eight_minutes() -> None:
    one_after_the_other = [max(run.SECONDS[name] for name in ("reference", "device", "sanitizer"))]
    one_after_the_other += [run.SECONDS[name] for name in ("build", "bench", "sweep")]
    assert sum(one_after_the_other) <= run.TOTAL
    assert run.TOTAL + 2 * 8.0 <= 8 * 60 + 2
    assert set(run.SECONDS) == {"build", "reference", "device", "sanitizer", "bench", "sweep"}


def test_workers_leave_cores_to_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases.importlib.util, "find_spec", lambda name: object())
    assert [xdist_options(cores) for cores in (1, 2, 4, 16, 128)] == [[], [], ["-n", "2"], ["-n", "12"], ["-n", "12"]]
    monkeypatch.setattr(phases.importlib.util, "find_spec", lambda name: None)
    assert xdist_options(16) == []


@pytest.mark.parametrize(("exit_code", "is_red"), [(0, False), (1, True), (5, False)])
def test_the_exit_code_is_that_of_the_tests(exit_code: int, is_red: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "test_phases", lambda out: [python("reference", f"print('tested'); raise SystemExit({exit_code})")])
    monkeypatch.setattr(run, "device_name", lambda: None)
    result = CliRunner().invoke(run.main, ["tests", "sanitizer", "bench", "sweep", "--out", str(tmp_path)])
    assert result.exit_code == int(is_red), result.output
    assert "reference  " + ("ok" if exit_code == 0 else f"failed (exit code {exit_code})") in result.output
    assert "left out: bench: no device" in result.output
    assert "left out: sanitizer: no" in result.output
    assert result.output.strip().splitlines()[-1].startswith("RED" if is_red else "green")
    assert "tested" in (tmp_path / "log.txt").read_text()


def test_results_of_an_earlier_run_are_not_taken_for_this_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reference.xml", "default.json", "sweep.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(run, "test_phases", lambda out: [python("reference", "print('cut off before it wrote anything')")])
    monkeypatch.setattr(run, "device_name", lambda: None)
    assert CliRunner().invoke(run.main, ["tests", "bench", "sweep", "--out", str(tmp_path)]).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_what_is_measured_knows_the_tests_of_this_run(tmp_path: Path) -> None:
    assert run._gate_arguments(tmp_path, True, True) == [f"--tests={tmp_path / 'reference.xml'}"]
    assert run._gate_arguments(tmp_path, False, True) == []  # python -m bench.gpu then runs them itself
    assert run._gate_arguments(tmp_path, True, False) == ["--no-gate"]
    command = run.bench_phase("bench", tmp_path, ["--no-gate"]).command
    assert command[1:4] == ("-m", "bench.gpu", "--out")
    assert f"--budget={run.SECONDS['bench'] - run.MARGIN}" in command
    tested = [word for phase in run.test_phases(tmp_path) for word in phase.command]
    assert "tests/gpu" in tested


def test_a_build_without_its_tools_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(run, "_missing", lambda *modules: ["ninja"])
    assert run.build_phase(said.append) is None
    assert said == ["left out: building the native CPU module: no ninja"]
