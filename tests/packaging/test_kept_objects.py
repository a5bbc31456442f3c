"""Objects that builds share: one is taken for another only where compiling would give the same."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers import kept_objects
from tests.helpers.kept_objects import Compilation, in_place_of_the_compiler

pytestmark = pytest.mark.usefixtures("needs_compiler")

FILES = {
    "csrc/probe.cpp": '#include "inner/first.h"\n#include <away.h>\nint probe() { return FIRST + AWAY; }\n',
    "csrc/inner/first.h": '#include "second.h"\n',
    "csrc/inner/second.h": "#define FIRST 1\n",
    "csrc/unused.h": "",
    "away/away.h": "#define AWAY 2\n",
}


def compilation(folder: Path, *options: str, target: str = "build/probe.o") -> Compilation:
    """Of a small source in ``folder``, whose headers from elsewhere are in ``folder`` too."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / target).parent.mkdir(exist_ok=True)
    compiler = shutil.which("c++")
    assert compiler is not None
    command = [compiler, "-MMD", "-MF", f"{target}.d", "-Icsrc", "-I", str(folder / "away"), *options, "-c", "csrc/probe.cpp", "-o", target]
    return Compilation(command, folder)


def test_where_a_build_lies_makes_no_difference(tmp_path: Path) -> None:
    first, second = compilation(tmp_path / "first"), compilation(tmp_path / "second", target="build/other.o")
    assert first.key() == second.key()
    second.write(first.run())
    assert (tmp_path / "second/build/other.o").read_bytes() == (tmp_path / "first/build/probe.o").read_bytes()
    depends = (tmp_path / "second/build/other.o.d").read_text(encoding="utf-8")
    headers = ["csrc/inner/first.h", "csrc/inner/second.h", str(tmp_path / "second/away/away.h")]
    assert depends.replace("\\\n", "").split() == ["build/other.o:", "csrc/probe.cpp", *headers]


@pytest.mark.parametrize("name", ["csrc/probe.cpp", "csrc/inner/first.h", "csrc/inner/second.h", "away/away.h"])
def test_a_change_in_what_is_compiled_makes_another_key(name: str, tmp_path: Path) -> None:
    made = compilation(tmp_path)
    before = made.key()
    with (tmp_path / name).open("a", encoding="utf-8") as file:
        file.write("// changed\n")
    assert made.key() != before


def test_a_change_elsewhere_makes_none(tmp_path: Path) -> None:
    made = compilation(tmp_path)
    before = made.key()
    (tmp_path / "csrc/unused.h").write_text("// changed\n", encoding="utf-8")
    assert made.key() == before


def test_flags_variables_and_the_compiler_are_part_of_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {compilation(tmp_path, *options).key() for options in ([], ["-O2"], ["-DA=1"], ["-DA=2"])}
    monkeypatch.setenv("CPATH", "/elsewhere")
    keys.add(compilation(tmp_path).key())
    monkeypatch.delenv("CPATH")
    monkeypatch.setattr(kept_objects, "_version", lambda compiler: "another")
    keys.add(compilation(tmp_path).key())
    assert len(keys) == 6


def test_the_script_compiles_once_and_passes_other_commands_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the compiler ends the script with the compiler's status, and nothing is kept."""
    (tmp_path / "bin").mkdir()
    compiler = in_place_of_the_compiler(tmp_path / "bin")["PATH"].partition(":")[0] + "/c++"
    made = compilation(tmp_path / "tree")
    subprocess.run([compiler, *made.command[1:]], cwd=tmp_path / "tree", check=True)
    compiled = (tmp_path / "tree/build/probe.o").read_bytes()
    (tmp_path / "tree/build/probe.o").unlink()
    subprocess.run([compiler, *made.command[1:]], cwd=tmp_path / "tree", check=True, env={"PATH": ""})
    assert (tmp_path / "tree/build/probe.o").read_bytes() == compiled
    linked = subprocess.run([compiler, "-shared", "build/probe.o", "-o", "probe.so"], cwd=tmp_path / "tree")
    assert linked.returncode == 0
    assert (tmp_path / "tree/probe.so").exists()
    failing = compilation(tmp_path / "tree", "-include", "no-such-header.h")
    for _ in range(2):
        failed = subprocess.run([compiler, *failing.command[1:]], cwd=tmp_path / "tree", capture_output=True, text=True)
        assert failed.returncode == 1
        assert "no-such-header.h" in failed.stderr
