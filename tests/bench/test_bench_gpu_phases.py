"""``make gpu``, its processes: what hangs is ended, what fails is told, and no line that was printed is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import phases
from bench.gpu.phases import Outcome, Phase, run_together, xdist_options
from bench.gpu.record import BENCH, LOG, TESTS, Record

ROOT = Path(__file__).parents[2]
ROWS = [{"kind": "op", "op": "a", "ms_50": 1.5}, {"kind": "test", "name": "b", "outcome": "passed"}]
PRINT = f"import json, time\nfor row in {ROWS!r}: print(json.dumps(row), flush=True)\n"


def python(name: str, code: str, seconds: float = 20.0, after: tuple[str, ...] = (), **env: str) -> Phase:
    return Phase(name, (sys.executable, "-c", code), seconds, env, after)


def nobody(outcome: Outcome) -> None:
    pass


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path, print)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "GRACE", 2.0)


def test_phases_side_by_side(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    said: list[Outcome] = []
    record.log("before")
    wave = [
        python("good", "import os; print('fine', os.environ['EXTRA'], os.environ['PYTHONPATH'].split(':')[1:])", EXTRA="given"),
        python("bad", "print('oh no'); raise SystemExit(3)"),
        python("hangs", "print('waiting', flush=True); import time; time.sleep(60)", seconds=1.0),
        Phase("absent", ("no-such-program",), 1.0),
    ]
    start = time.monotonic()
    good, bad, hangs, absent = run_together(wave, record, said.append)
    assert time.monotonic() - start < 10
    assert (good.code, good.is_green, good.lines) == (0, True, ("fine given ['elsewhere']",))
    assert (bad.code, bad.state) == (3, "failed (exit code 3)")
    assert hangs.code is None
    assert hangs.state.startswith("cut off after ")
    assert hangs.lines[0] == "waiting"
    assert absent.lines == ("no-such-program cannot be started: No such file or directory",)
    assert {outcome.phase.name for outcome in said} == {"good", "bad", "hangs", "absent"}
    text = (tmp_path / LOG).read_text()
    assert text.startswith("before\n")
    assert all(line in text for line in ("good | fine", "bad | oh no", "hangs | waiting"))
    assert sys.executable not in text
    states = [json.loads(line) for line in (tmp_path / TESTS).read_text().splitlines()]
    assert {(row["kind"], row["name"], row["state"].split()[0]) for row in states} == {
        ("phase", "good", "ok"), ("phase", "bad", "failed"), ("phase", "hangs", "cut"), ("phase", "absent", "failed"),
    }  # fmt: skip


def test_a_phase_that_is_cut_off_loses_no_row(record: Record, tmp_path: Path) -> None:
    (outcome,) = run_together([python("slow", PRINT + "time.sleep(60)", seconds=1.5)], record, nobody)
    assert outcome.code is None
    assert list(outcome.rows) == ROWS
    assert (tmp_path / BENCH).read_text() == json.dumps(ROWS[0]) + "\n"
    assert (tmp_path / TESTS).read_text().startswith(json.dumps(ROWS[1]) + "\n")
    assert '"kind": "op"' not in (tmp_path / LOG).read_text()


def test_a_run_that_is_killed_loses_no_row(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from bench.gpu.phases import Phase, run_together; from bench.gpu.record import Record\n"
        f"command = (sys.executable, '-c', {PRINT + 'time.sleep(8)'!r})\n"
        "run_together([Phase('slow', command, 60.0)], Record(Path(sys.argv[1]), print), print)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    try:
        for _ in range(200):
            if (tmp_path / TESTS).exists():
                break
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert json.loads((tmp_path / BENCH).read_text()) == ROWS[0]
    assert json.loads((tmp_path / TESTS).read_text()) == ROWS[1]


def test_the_children_of_who_is_cut_off_end(record: Record, tmp_path: Path) -> None:
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\ntime.sleep(60)\n"
    )
    # A busy machine takes a second or two to start two Pythons.
    (outcome,) = run_together([python("slow", code, seconds=3.0)], record, nobody)
    assert outcome.code is None
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


def test_who_does_not_end_when_asked_is_killed_and_nobody_waits_for_that(record: Record) -> None:
    stubborn = "import signal, time\nsignal.signal(2, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(60)"
    wave = [python(f"stubborn {i}", stubborn, seconds=2.0) for i in range(4)]
    start = time.monotonic()
    outcomes = run_together([*wave, python("long", "import time; time.sleep(3); print('done')")], record, nobody)
    assert time.monotonic() - start < 8  # four after each other would take longer
    assert [outcome.lines for outcome in outcomes] == [("deaf",)] * 4 + [("done",)]
    assert [outcome.code for outcome in outcomes] == [None] * 4 + [0]


def test_what_a_phase_leaves_running_does_not_hold_up_the_rest(record: Record) -> None:
    code = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\nprint('done')\n"
    start = time.monotonic()
    (outcome,) = run_together([python("careless", code)], record, nobody)
    assert (outcome.code, outcome.lines) == (0, ("done",))
    assert time.monotonic() - start < 10


def test_a_phase_waits_for_those_it_comes_after(record: Record) -> None:
    said: list[str] = []
    wave = [
        python("last", "print('last')", after=("slow", "first")),
        python("first", "print('first')", after=("nowhere",)),
        python("slow", "import time; time.sleep(1); raise SystemExit(1)"),
    ]
    outcomes = run_together(wave, record, lambda outcome: said.append(outcome.phase.name))
    assert [outcome.phase.name for outcome in outcomes] == ["last", "first", "slow"]
    assert said == ["first", "slow", "last"]
    assert [outcome.code for outcome in outcomes] == [0, 0, 1]


def test_who_is_too_late_is_left_out_and_who_waits_for_him_goes_on(record: Record) -> None:
    until = time.monotonic() + 1.0
    slow = dataclasses.replace(python("slow", "import time; time.sleep(60)"), until=until)
    late = dataclasses.replace(python("late", "print('never')", after=("slow",)), until=until)
    outcomes = run_together([slow, late, python("last", "print('last')", after=("late",))], record, nobody)
    assert [outcome.code for outcome in outcomes] == [None, None, 0]
    assert outcomes[1].state == "left out: no time was left"


def test_a_phase_reads_what_is_made_when_it_begins(record: Record) -> None:
    before: list[Any] = []
    first = python("first", PRINT)
    reads = dataclasses.replace(python("reads", "print(input())", after=("first",)), stdin=lambda: f"{len(before)} {len(record.rows)}\n")
    outcomes = run_together([reads, first], record, before.append)
    assert outcomes[0].lines == ("1 3",)  # two rows and how the phase went


def test_workers_leave_cores_to_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases.importlib.util, "find_spec", lambda name: object())
    assert [xdist_options(cores) for cores in (1, 2, 4, 16, 128)] == [[], [], ["-n", "2"], ["-n", "12"], ["-n", "12"]]
    assert xdist_options(16, most=4) == ["-n", "4"]
    monkeypatch.setattr(phases.importlib.util, "find_spec", lambda name: None)
    assert xdist_options(16) == []
