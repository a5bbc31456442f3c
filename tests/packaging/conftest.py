"""The wheels that the packaging tests share: each is built once a run."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.packaging.support import ROOT, copy_tree, pip_wheel, run


@pytest.fixture(scope="session")
def needs_compiler() -> None:
    missing = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["missing_toolchain"]()
    if missing is not None:
        pytest.skip(missing)


@pytest.fixture(scope="session")
def needs_index(tmp_path_factory) -> None:
    """Build isolation downloads setuptools, pybind11 and ninja."""
    folder = tmp_path_factory.mktemp("index")
    said = run(sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "pybind11", cwd=folder, succeeds=None)
    if not list(folder.glob("pybind11*")):
        pytest.skip(f"no package index can be reached: {said[-300:]}")


@pytest.fixture(scope="session")
def no_compiler(tmp_path_factory) -> dict[str, str]:
    """An environment whose PATH is an empty folder."""
    return {"PATH": str(tmp_path_factory.mktemp("empty"))}


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A copy of the tree in which the fixtures `wheel` and `sdist` build."""
    return copy_tree(tmp_path_factory.mktemp("source") / "sam_kernels")


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory, needs_compiler, needs_index) -> Path:
    """The wheel with the native core, built in isolation with the flags that ship. For the CPU: test_cuda.py looks at the other module."""
    target = tmp_path_factory.mktemp("wheel") / "dist"
    pip_wheel(source, target, isolated=True, SAM_KERNELS_BUILD="cpu")
    (path,) = target.iterdir()
    return path


@pytest.fixture(scope="session")
def pure_wheel(tmp_path_factory) -> Path:
    """The wheel of SAM_KERNELS_BUILD=none."""
    folder = tmp_path_factory.mktemp("pure")
    pip_wheel(copy_tree(folder / "source"), folder / "dist", SAM_KERNELS_BUILD="none")
    (path,) = (folder / "dist").iterdir()
    return path
