"""New environments with one torch for the CPU, for the checks that need another than this one's."""

from __future__ import annotations

import json
import re
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ROOT", "NotToBeHad", "Torch", "is_for_cuda", "new_environment", "pinned", "resolve_torch"]

ROOT = Path(__file__).resolve().parents[1]


class NotToBeHad(Exception):
    """No torch for the CPU of this version: not on the index, or only as a build for CUDA, which brings gigabytes."""


def pinned(*names: str) -> list[str]:
    """Return the lines of constraints.txt for these packages, markers included. Raises LookupError for one that has no line."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = []
    for name in names:
        of_name = [line for line in lines if re.match(rf"{re.escape(name)}==", line, re.IGNORECASE)]
        if not of_name:
            raise LookupError(f"constraints.txt has no line for {name}")
        found += of_name
    return found


def new_environment(folder: Path) -> Path:
    """Make an empty environment of the running Python, with pip; return its interpreter."""
    venv.create(folder, with_pip=True, clear=True, symlinks=True)
    return folder / "bin" / "python"


def pip(python: Path, *words: str | Path) -> str:
    """Run pip of an environment; return its standard output. Raises subprocess.CalledProcessError with pip's words printed."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def is_for_cuda(requirements: Sequence[str]) -> bool:
    """Whether a torch with these requirements is a build for CUDA: those require NVIDIA's packages on Linux."""
    return any(re.match(r"nvidia[-_]|cuda[-_]", requirement) for requirement in requirements)


def resolve_torch(python: Path, version: str) -> str:
    """Return the full version ("2.13.0+cpu") that pip would install. Raises NotToBeHad. Downloads metadata only."""
    options = ("--dry-run", "--quiet", "--ignore-installed", "--no-deps", "--only-binary", ":all:", "--report", "-")
    try:
        report = json.loads(pip(python, "install", *options, f"torch=={version}"))
    except subprocess.CalledProcessError:
        raise NotToBeHad("not on the package index") from None
    metadata = report["install"][0]["metadata"]
    if is_for_cuda(metadata.get("requires_dist", [])):
        raise NotToBeHad("the package index has only a build for CUDA")
    return str(metadata["version"])


class Torch:
    """An environment with one torch for the CPU. Raises NotToBeHad before anything is downloaded."""

    def __init__(self, folder: Path, version: str) -> None:
        self.python = new_environment(folder)
        self.version = resolve_torch(self.python, version)
        pip(self.python, "install", "--quiet", f"torch=={self.version}")

    def install(self, *words: str | Path) -> None:
        pip(self.python, "install", "--quiet", *words)
