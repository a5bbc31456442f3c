"""Builds of the package as a user makes them, each from a copy of the tree, so that nothing built beside the sources can help."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_PASSED_ON = ("SAM_KERNELS_", "PYTHONPATH", "CXX", "MAKE", "TORCH_CUDA_ARCH_LIST")  # what would change a build
BUILT = ("build", "dist", ".venv", ".git", "__pycache__", "*.egg-info", "*.so", ".*_cache", ".benchmarks", "out", "results")


def copy_tree(target: Path) -> Path:
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*BUILT))
    return target


def run(*command: str | Path, cwd: Path, env: Mapping[str, str | None] = {}, succeeds: bool | None = True) -> str:
    """Runs a command and returns all it printed. ``env`` is added to the environment (None removes); ``succeeds`` None: either way."""
    whole = {name: value for name, value in os.environ.items() if not name.startswith(NOT_PASSED_ON)}
    whole |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    for name, value in env.items():
        whole.pop(name, None)
        if value is not None:
            whole[name] = value
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if succeeds is not None and (result.returncode == 0) != succeeds:
        pytest.fail(f"{command} ended with {result.returncode}\n{result.stdout[-6000:]}", pytrace=False)
    return result.stdout


def pip_wheel(source: Path, target: Path, *, isolated: bool = False, succeeds: bool = True, **env: str) -> str:
    """`pip wheel` of a source folder, verbose. Without isolation it builds with this environment's setuptools, pybind11, ninja."""
    options = ["--no-deps", "--verbose", "--wheel-dir", target, *([] if isolated else ["--no-build-isolation"])]
    return run(sys.executable, "-m", "pip", "wheel", source, *options, cwd=target.parent, env=env, succeeds=succeeds)


def new_environment(folder: Path) -> Path:
    """The interpreter of a new environment that sees this one's packages (torch) but not this one's sam_kernels."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    # A path in a .pth file is only added, its own .pth files are not read: an editable sam_kernels does not come along.
    (site / "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin" / "python"


def install(python: Path, what: str | Path, *options: str, cwd: Path, env: Mapping[str, str | None] = {}) -> str:
    return run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", *options, what, cwd=cwd, env=env)
