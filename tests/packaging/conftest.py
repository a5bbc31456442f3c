"""The wheels that the packaging tests share: each is built once a run. Builds share objects with each other, and with earlier runs."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.helpers.kept_objects import built_folder, in_place_of_the_compiler, keep_objects
from tests.packaging.support import ROOT, copy_tree, pip_wheel, run

SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


@pytest.fixture(scope="session")
def needs_compiler() -> None:
    if (missing := SETUP["missing_toolchain"]()) is not None:
        pytest.skip(missing)


@pytest.fixture(scope="session")
def kept_objects(tmp_path_factory, needs_compiler) -> dict[str, str]:
    """An environment for builds that compile only what neither the installation nor an earlier build has compiled."""
    if (folder := built_folder(SETUP["ninja_build"])) is not None:
        keep_objects(folder / SETUP["ninja_build"].python_folder())
    return in_place_of_the_compiler(tmp_path_factory.mktemp("compiler"))


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
def wheel(source, tmp_path_factory, kept_objects, needs_index) -> Path:
    """The wheel with the native core, built in isolation with the flags that ship. For the CPU: test_cuda.py looks at the other module."""
    target = tmp_path_factory.mktemp("wheel") / "dist"
    pip_wheel(source, target, isolated=True, **kept_objects, SAM_KERNELS_BUILD="cpu")
    (path,) = target.iterdir()
    return path


@pytest.fixture(scope="session")
def pure_wheel(tmp_path_factory) -> Path:
    """The wheel of SAM_KERNELS_BUILD=none."""
    folder = tmp_path_factory.mktemp("pure")
    pip_wheel(copy_tree(folder / "source"), folder / "dist", SAM_KERNELS_BUILD="none")
    (path,) = (folder / "dist").iterdir()
    return path
