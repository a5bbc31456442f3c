"""Native modules built on one machine for another: when they are taken, and what is said where they are not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from bench.environment import commit
from bench.gpu import carry, device

THIS = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As built for this Python from these sources, of nothing that can be imported."""
    for module in carry.MODULES:
        carry._file(tmp_path, module).write_bytes(b"no module")
    (tmp_path / carry.MANIFEST).write_text(json.dumps({"sources": carry.sources(), "capability": "9.0"}))
    return tmp_path


def imported_as(architectures: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = SimpleNamespace(returncode=0, stdout=f"{architectures}\n", stderr="")
    monkeypatch.setattr(carry.subprocess, "run", lambda *arguments, **options: done)


def test_modules_are_taken_only_if_they_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = carry.reason_unfit(90, folder)
    assert reason is not None
    assert reason.startswith("_cuda cannot be imported (ImportError: ")
    imported_as("8.0;9.0", monkeypatch)
    assert carry.reason_unfit(90, folder) is None
    assert carry.reason_unfit(86, folder) is None
    assert carry.reason_unfit(100, folder) == "_cuda has code for 8.0;9.0, this device is 10.0"
    carry._file(folder, "_cpu").rename(folder / "_cpu.cpython-27-x86_64-linux-gnu.so")
    assert carry.reason_unfit(90, folder) == f"they are for another Python than {THIS}"
    (folder / carry.MANIFEST).write_text(json.dumps({"sources": "other", "capability": "9.0"}))
    assert carry.reason_unfit(90, folder) == "they were built from other sources"
    (folder / carry.MANIFEST).write_text("{")
    assert carry.reason_unfit(90, folder) == f"there are none in {folder}"
    assert carry.is_there(folder)
    assert not carry.is_there(folder / "none")


def test_modules_that_were_built_here_are_imported_here(folder: Path) -> None:
    built = [carry._file(carry.ROOT / "sam_kernels", module) for module in carry.MODULES]
    if not all(path.exists() for path in built):
        pytest.skip("the CUDA kernels are not built here")
    for path in built:
        shutil.copy2(path, folder)
    assert carry.reason_unfit(90, folder) is None


def test_modules_are_put_beside_the_package(folder: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    carry._file(package, "_cuda").write_bytes(b"old")
    assert carry.install(folder, package) == ["_cuda", "_cpu"]
    assert {path.name for path in package.iterdir()} == {carry._file(package, module).name for module in carry.MODULES}
    assert carry._file(package, "_cuda").read_bytes() == b"no module"


def test_every_source_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "ROOT", tmp_path)
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "setup.py").write_text("a")
    found = {carry.sources()}
    for name in ("a.cu", "a.h", "b.h"):
        (tmp_path / "csrc" / "cuda" / name).write_text("x")
        found.add(carry.sources())
    (tmp_path / "csrc" / "cuda" / "a.cu").write_text("y")
    assert len(found | {carry.sources()}) == 5
    before = carry.sources()
    (tmp_path / "csrc" / "a.o").write_text("")
    assert carry.sources() == before


def test_a_build_is_for_one_python_and_one_capability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[list[str], dict[str, str]]] = []
    real = subprocess.run

    def fake(command: list[str], **options: Any) -> Any:
        if "setup.py" not in command:
            return real(command, **options)
        told.append((command, options["env"]))
        out = Path(command[command.index("--build-lib") + 1]) / "sam_kernels"
        out.mkdir(parents=True)
        for module in carry.MODULES:
            (out / f"{module}.so").write_bytes(b"x" * 2_100_000)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(carry.subprocess, "run", fake)
    monkeypatch.setattr(carry, "has_nvcc", lambda: True)
    monkeypatch.setattr(carry, "suffix_of", lambda python, version: ".so")
    result = CliRunner().invoke(
        carry.main, ["--python", sys.executable, "--version", THIS, "--capability", "9.0", "--out", str(tmp_path / "c")]
    )
    assert result.exit_code == 0, result.output
    assert result.output == f"{tmp_path / 'c'}: _cpu.so 2.1 MB, _cuda.so 2.1 MB; for Python {THIS} and 9.0\n"
    ((command, env),) = told
    assert command[0] == sys.executable
    assert (env["SAM_KERNELS_BUILD"], env["TORCH_CUDA_ARCH_LIST"], env["SAM_KERNELS_INSTRUCTION_SETS"]) == ("cuda", "9.0", "baseline")
    # The other Python finds the tools there.
    code = "import setuptools, pybind11, ninja"
    assert real([sys.executable, "-S", "-c", code], env={**os.environ, "PYTHONPATH": env["PYTHONPATH"]}, check=False).returncode == 0
    found = json.loads((tmp_path / "c" / carry.MANIFEST).read_text())
    assert (found["sources"], found["capability"]) == (carry.sources(), "9.0")
    assert carry.carried_commit(tmp_path / "c") == commit()
    assert carry.carried_commit(tmp_path) == {}
    # A copy of the checkout has no history of its own: its results have the commit of its modules.
    monkeypatch.setattr(device, "environment", lambda: {"commit": None, "dirty": None})
    monkeypatch.setattr(carry, "carried_commit", lambda: {"commit": "abc", "dirty": False})
    assert (device.gpu_environment()["commit"], device.gpu_environment()["dirty"]) == ("abc", False)
    monkeypatch.setattr(device, "environment", lambda: {"commit": "def", "dirty": True})
    assert device.gpu_environment()["commit"] == "def"


def test_what_is_missing_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*arguments: str) -> str:
        result = CliRunner().invoke(carry.main, ["--out", str(tmp_path / "c"), *arguments])
        assert result.exit_code == 1
        assert result.output.count("\n") == 1
        return result.output

    assert said("--python", "/no/python").startswith("Error: /no/python is no Python 3.12 with its headers: install one")
    assert said("--python", sys.executable, "--version", "3.9").startswith(f"Error: {sys.executable} is no Python 3.9 with its headers")
    monkeypatch.setattr(carry, "candidates", lambda version: [])
    assert said().startswith("Error: there is no Python 3.12 with its headers: install one (pyenv install 3.12) or name it with --python")
    monkeypatch.setattr(carry, "suffix_of", lambda python, version: ".so")
    monkeypatch.setattr(carry, "has_nvcc", lambda: False)
    assert said("--python", "python3").startswith("Error: there is no nvcc: put it on PATH, or set CUDA_HOME")
    assert not (tmp_path / "c").exists()
