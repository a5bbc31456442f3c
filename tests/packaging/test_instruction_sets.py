"""Which instruction sets the CPU's kernels are compiled for. Nothing is compiled here."""

from __future__ import annotations

import io
import re
import runpy
from pathlib import Path

import pytest

BUILD = runpy.run_path(str(Path(__file__).resolve().parents[2] / "setup.py"), run_name="setup")["ninja_build"]
ALL = list(BUILD.INSTRUCTION_SETS)


def compiled() -> tuple[set[str], set[str]]:
    """The sets that kernels are compiled for, and those that the engine is told of."""
    ninja = pytest.importorskip("ninja")
    file = io.StringIO()
    BUILD.write_rules(ninja.ninja_syntax.Writer(file, width=10_000), "folder", ["_cpu"], None)
    rules = file.getvalue()
    engine = rules[rules.index("build folder/cpu/dispatch.o") :].partition("\nbuild")[0]
    return set(re.findall(r"-DSAM_ISA=(\w+)", rules)), {name.lower() for name in re.findall(r"-DSAM_(\w+)_KERNELS", engine)}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("", ALL), ("baseline", ["baseline"]), (ALL[-1], ["baseline", ALL[-1]]), (";".join(reversed(ALL)), ALL)],
)
def test_the_baseline_and_what_is_asked_for(asked: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAM_KERNELS_INSTRUCTION_SETS", asked)
    assert compiled() == (set(expected), set(expected) - {"baseline"})


def test_each_choice_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAM_KERNELS_INSTRUCTION_SETS", "")
    usual = BUILD.folder_name()
    monkeypatch.setenv("SAM_KERNELS_INSTRUCTION_SETS", "baseline")
    assert BUILD.folder_name() != usual


def test_a_set_that_is_unknown_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAM_KERNELS_INSTRUCTION_SETS", "baseline sse9")
    with pytest.raises(BUILD.Unknown, match=f"^SAM_KERNELS_INSTRUCTION_SETS: 'sse9' is unknown; the names are {', '.join(ALL)}$"):
        compiled()
