"""What SAM costs in a framework: all of the benchmark that needs no framework. (The rest: tests/frameworks/test_cost.py.)"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import sleep
from typing import Any

import pytest
from click.testing import CliRunner

from bench.frameworks import __main__ as command
from bench.frameworks import own_time as own
from bench.frameworks.bars import ADDED_PCT, verdicts
from bench.frameworks.loops import PLAIN, PLAIN_BACKWARD, PLAIN_SAM, make_loop, missing, names_of
from bench.frameworks.measure import STUB, added, measure
from bench.frameworks.paced import Paced
from bench.frameworks.problem import Stub
from bench.frameworks.report import main as report
from bench.page import BEGIN, END, ROOT

PASSES = {PLAIN: 1, PLAIN_SAM: 2, PLAIN_BACKWARD: 2}


def test_loops_take_turns_step_by_step() -> None:
    made: list[tuple[str, int]] = []

    def loop_of(name: str, steps: int) -> Callable[[Callable[[], None]], None]:
        def loop(pause: Callable[[], None]) -> None:
            for i in range(steps):
                made.append((name, i))
                pause()
            made.append((name, -1))

        return loop

    first, second = Paced(loop_of("first", 2)), Paced(loop_of("second", 1))
    assert made == []
    for each in (first, second, first):
        each()
    assert made == [("first", 0), ("second", 0), ("first", 1)]
    second.finish()
    first.finish()
    assert made[3:] == [("second", -1), ("first", -1)]
    with pytest.raises(RuntimeError, match="the loop has ended"):
        first()


def test_an_error_of_a_loop_is_raised_where_it_is_called() -> None:
    def loop(pause: Callable[[], None]) -> None:
        pause()
        raise ValueError("in the second step")

    paced = Paced(loop)
    paced()
    with pytest.raises(ValueError, match="in the second step"):
        paced()


@pytest.mark.parametrize("name", PASSES)
def test_a_plain_loop_makes_its_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    forward = Stub.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(Stub, "forward", counted)
    found = []
    make_loop(name, STUB, 4)(lambda: found.append(calls))
    assert found == [PASSES[name] * step for step in (1, 2, 3, 4)]


def test_plain_loops_are_measured_without_a_framework() -> None:
    found = measure([], problem=STUB, rounds=2, inner=1)
    assert found["ms"].keys() == found["stub_ms"].keys() == {*PASSES}
    assert all(0 < low <= middle <= high for low, middle, high in [*found["ms"].values(), *found["stub_ms"].values()])
    assert found["plain_of_adamw"].keys() == {PLAIN_SAM, PLAIN_BACKWARD}
    assert found["rows"] == []


def _waiting(file: str, milliseconds: float, then: Callable[[], None] | None = None) -> Callable[[], None]:
    """A function as if it stood in this file."""
    source = "def wait():\n sleep(seconds)\n if then is not None:\n  then()\n"
    space: dict[str, Any] = {"sleep": sleep, "seconds": milliseconds / 1e3, "then": then}
    exec(compile(source, file, "exec"), space)
    wait: Callable[[], None] = space["wait"]
    return wait


def test_own_time_is_that_of_our_functions_and_of_the_standard_library_below_them() -> None:
    standard = _waiting(f"{own._STANDARD}/made_up.py", 10)
    theirs = _waiting(f"{own._STANDARD}/site-packages/framework/made_up.py", 20, then=standard)  # whose time is theirs
    ours = _waiting(f"{own._OURS}/made_up.py", 5, then=lambda: (standard(), theirs()))  # this function is a test's, not ours
    direct = _waiting(f"{own._OURS}/made_up.py", 5, then=standard)

    def loop(pause: Callable[[], None]) -> None:
        for each in (ours,) * (own.WARMUP + 3) + (direct,) * 3:
            theirs()
            each()
            pause()

    found = own.own_time(loop)
    assert len(found) == 6
    assert 5e3 <= min(found[:3]) < 10e3  # microseconds
    assert 15e3 <= min(found[3:]) < 20e3


def test_what_is_added_is_the_difference_of_the_differences() -> None:
    adamw, sam = names_of("accelerate")
    samples = {adamw: [30.0, 31.0], sam: [62.0, 64.0], PLAIN: [29.0, 30.0], PLAIN_SAM: [60.0, 62.5], PLAIN_BACKWARD: [0.0, 0.0]}
    assert added(samples, "accelerate") == [1.0, 0.5]
    assert median(added(samples, "accelerate")) == 0.75


def _row(framework: str, ratio: float, added_pct: float, host_pct: float, own_pct: float) -> dict[str, Any]:
    more = {"added_pct": [added_pct - 1, added_pct, added_pct + 1], "host_pct": host_pct, "own_pct": own_pct}
    return {"framework": framework, "version": "1.2", "of_adamw": [1.0, ratio, 3.0], "host_us": 123.4, "own_us": 5.0, **more}


RESULT: dict[str, Any] = {
    **{"command": "python -m bench.frameworks", "problem": STUB.settings(), "cpu": "Some CPU", "threads": 1, "instruction_set": "avx2"},
    **{"torch": "2.13.0", "commit": "abc", "allocator": "keeping", "load_1min": 0.1},
    "ms": {name: [1.0, 2.0, 3.0] for name in (*PASSES, *names_of("transformers"), *names_of("lightning"))},
    "plain_of_adamw": {PLAIN_SAM: [1.0, 2.01, 3.0], PLAIN_BACKWARD: [1.0, 2.02, 3.0]},
    "rows": [_row("transformers", 2.04, ADDED_PCT, 0.5, 0.01), _row("lightning", 2.06, 1.01, 1.2, 1.3)],
}


def test_bars() -> None:
    assert [line.rpartition(": ")[2] for line in verdicts(RESULT)] == ["pass"] * 4 + ["FAIL"] * 4


def test_the_page_has_every_row_and_is_checked(tmp_path: Path) -> None:
    file, page = tmp_path / "frameworks.json", tmp_path / "page.md"
    file.write_text(json.dumps(RESULT))
    page.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n")
    arguments = [str(file), "--docs", str(page)]
    assert CliRunner().invoke(report, [*arguments, "--check"]).exit_code == 1
    assert CliRunner().invoke(report, arguments).exit_code == 0
    assert CliRunner().invoke(report, [*arguments, "--check"]).exit_code == 0
    text = page.read_text()
    assert "| Trainer (transformers 1.2) | 1.0 / 2.0 / 3.0 | 1.0 / 2.0 / 3.0 | 2.04 |" in text
    assert "| Lightning (lightning 1.2) | 1.0 / 2.0 / 3.0 | 1.0 / 2.0 / 3.0 | 2.06 (missed) |" in text
    assert "| Trainer | 1.00 % (0.0 – 2.0) | 0.50 % (123 µs) | 0.01 % (5 µs) |" in text
    assert "| Lightning | 1.01 % (missed) (0.0 – 2.0) | 1.20 % (missed) (123 µs) | 1.30 % (missed) (5 µs) |" in text


def test_a_framework_that_is_missing_is_named() -> None:
    assert "no_such_framework" in str(missing("no_such_framework"))


def test_without_transformers_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "missing", lambda name: "No module named 'transformers'")
    monkeypatch.setattr(command, "use_one_arena", lambda: None)  # of this process
    run = CliRunner().invoke(command.main, ["--allocator", "default", "--no-gate"])
    assert run.exit_code == 1
    assert "transformers, whose GPT-2 all loops train: No module named 'transformers'" in run.output


@pytest.mark.stored
def test_the_page_shows_the_stored_result() -> None:
    (stored,) = (ROOT / "bench" / "results").glob("*/frameworks.json")
    assert CliRunner().invoke(report, [str(stored), "--check"]).exit_code == 0
