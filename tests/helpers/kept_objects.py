"""Stands in for the C++ compiler in builds of the package: an object that was compiled before is taken from build/test-cache.

An object is kept under the hash of all that it depends on: the compiler's version, its arguments, the source with every file of csrc that
it includes, and the headers in the folders that the arguments name by absolute paths (Python's and pybind11's). Where the object, its
dependency file and those folders lie is not part of the hash, so builds in different folders share objects. The rest of a build is real:
setup.py writes the rules, ninja decides what is compiled, and the linker links.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers.shared import ROOT, digest, digest_of_files, made_once, with_included

__all__ = ["built_folder", "in_place_of_the_compiler", "keep_objects"]

KIND = "objects"
VARIABLES = ("CPATH", "CPLUS_INCLUDE_PATH", "GCC_EXEC_PREFIX", "COMPILER_PATH")  # which change what the same arguments mean
Made = tuple[bytes, str]  # an object, and the text of its dependency file


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


class Compilation:
    """A command that compiles one source of csrc and writes for ninja what the object depends on."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.command = command
        self.folder = folder
        self.source, self.object, self.depends = (command[command.index(option) + 1] for option in ("-c", "-o", "-MF"))
        self.headers = [word for word in command[1:] if word.startswith("/") and Path(word).is_dir()]
        self.places = {self.object: "<object>"} | {place: f"<headers {i}>" for i, place in enumerate(self.headers)}

    def key(self) -> str:
        variables = [os.environ.get(name) for name in VARIABLES]
        arguments = [self.without_places(word) for word in self.command[1:] if word != self.depends]
        headers = [digest_of_files(Path(place).rglob("*.h")) for place in self.headers]
        sources = digest_of_files(with_included(self.folder / self.source, self.folder / "csrc"))
        return digest(Path(__file__).read_bytes(), _version(self.command[0]), variables, arguments, headers, sources)

    def without_places(self, text: str) -> str:
        for place in sorted(self.places, key=len, reverse=True):
            text = text.replace(place, self.places[place])
        return text

    def run(self) -> Made:
        if (status := subprocess.run(self.command, cwd=self.folder).returncode) != 0:
            raise SystemExit(status)
        depends = (self.folder / self.depends).read_text(encoding="utf-8")
        return (self.folder / self.object).read_bytes(), self.without_places(depends)

    def write(self, made: Made) -> None:
        content, depends = made
        for place, name in self.places.items():
            depends = depends.replace(name, place)
        (self.folder / self.object).write_bytes(content)
        (self.folder / self.depends).write_text(depends, encoding="utf-8")


def _compiler() -> str:
    compiler = shutil.which("c++")
    assert compiler is not None
    return compiler


def in_place_of_the_compiler(folder: Path) -> dict[str, str]:
    """Write a script named ``c++`` into ``folder``; return the environment in which it is found before the compiler."""
    script = folder / "c++"
    script.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-I", "-S", __file__, _compiler()])} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def built_folder(build: Any) -> Path | None:
    """The object files of the installed build, if they are those of the sources as they are, and of the flags that ship.

    ``build`` is the module ninja_build of csrc.
    """
    if (build.setting("CXX"), build.setting("SAM_KERNELS_CXXFLAGS")) != ("c++", ""):
        return None
    folder: Path = ROOT / "build" / build.folder_name()
    rules = folder / build.python_folder() / "build.ninja"
    if not rules.exists() or rules.stat().st_mtime < max(path.stat().st_mtime for path in (ROOT / "setup.py", Path(build.__file__))):
        return None
    return folder if "no work to do" in _ninja(rules.parent, "-n", _module(rules.parent)) else None


def keep_objects(folder: Path) -> None:
    """Keep the objects of _cpu, which are up to date: an installation has just compiled them. ``folder`` has the build.ninja."""
    compiler = _compiler()
    for command in map(shlex.split, _ninja(folder, "-t", "commands", _module(folder)).splitlines()):
        if "-c" in command:
            compilation = Compilation([compiler, *command[1:]], ROOT)
            _, *depends = _ninja(folder, "-t", "deps", compilation.object).splitlines()
            text = f"{compilation.object}: {' '.join(line.strip() for line in depends)}\n"
            made = (ROOT / compilation.object).read_bytes(), compilation.without_places(text)
            made_once(KIND, compilation.key(), lambda made=made: made)  # type: ignore[misc]


def _module(folder: Path) -> str:
    return str(folder.relative_to(ROOT) / "_cpu.so")


def _ninja(folder: Path, *words: str) -> str:
    import ninja

    command = [Path(ninja.BIN_DIR) / "ninja", "-C", ROOT, "-f", folder / "build.ninja", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(command: Sequence[str]) -> None:
    if "-c" not in command:  # it links, or is asked for its version
        os.execv(command[0], command)
    compilation = Compilation(command, Path.cwd())
    compilation.write(made_once(KIND, compilation.key(), compilation.run))


if __name__ == "__main__":
    main(sys.argv[1:])
