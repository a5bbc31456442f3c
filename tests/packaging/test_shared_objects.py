"""Builds for several Pythons in one tree share the objects that do not depend on Python. Nothing is compiled here."""

from __future__ import annotations

import io
import runpy
import sysconfig
from pathlib import Path

import pytest

BUILD = runpy.run_path(str(Path(__file__).resolve().parents[2] / "setup.py"), run_name="setup")["ninja_build"]
# The sources that include Python's or pybind11's headers, and the modules linked with them.
OF_A_PYTHON = {"operation", "tensor_list", "bind_cpu", "bind_cuda", "_cpu", "_cuda_on_host"}


def targets(monkeypatch: pytest.MonkeyPatch, soabi: str) -> dict[str, str]:
    """Each target of build.ninja, with the text of its rule, for an interpreter whose modules have this tag."""
    ninja = pytest.importorskip("ninja")
    variable = sysconfig.get_config_var
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: soabi if name == "SOABI" else variable(name))
    file = io.StringIO()
    BUILD.write_rules(ninja.ninja_syntax.Writer(file, width=10_000), "folder", ["_cpu", "_cuda_on_host"], None)
    parts = file.getvalue().split("\nbuild ")[1:]
    return {part.partition(":")[0]: part.partition("\ndefault")[0].strip() for part in parts}


def test_pythons_share_the_kernels_and_nothing_that_sees_pythons_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = targets(monkeypatch, "cpython-311"), targets(monkeypatch, "cpython-313")
    common = {target: text for target, text in first.items() if target in second}
    assert len(common) > 40
    assert common == {target: second[target] for target in common}
    assert not [target for target, text in common.items() if "pybind11" in text]
    for tag, own in (("cpython-311", first), ("cpython-313", second)):
        assert {Path(target).name.partition(".")[0] for target in own.keys() - common.keys()} == OF_A_PYTHON
        assert {str(Path(target).parent) for target in own.keys() - common.keys()} == {f"folder/{tag}"}


def test_the_tag_of_a_python_is_not_in_the_name_of_the_shared_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BUILD.python_folder() not in BUILD.folder_name()
    assert sysconfig.get_platform() in BUILD.folder_name()
