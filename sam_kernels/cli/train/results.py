"""The folder of the results: checked before the training, so that no run is lost to it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from sam_kernels.cli.train.plot import save_curves
from sam_kernels.cli.train.run import Run

__all__ = ["CURVES", "JSON", "prepare", "save"]

CURVES, JSON = "train.png", "train.json"
_ROOM = 1 << 20  # bytes: more than both files take


def prepare(out: Path) -> None:
    """Make the folder and make sure that the results can be written there. Raises BadParameter with the reason if not."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(bytes(_ROOM))
        for path in (out / CURVES, out / JSON):
            if path.is_dir():
                raise IsADirectoryError(None, "is a folder", str(path))
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(None, "is write-protected", str(path))
    except OSError as error:
        raise click.BadParameter(f"{error.filename or out}: {_reason(error)}.", param_hint="'--out'") from error


def save(out: Path, runs: Sequence[Run], report: str, *, title: str) -> None:
    """Write both files. Raises ClickException, once both were tried, for one that cannot be written."""
    failures = []
    writers: dict[str, Callable[[Path], object]] = {
        CURVES: lambda path: save_curves(path, runs, title=title),
        JSON: lambda path: path.write_text(report + "\n"),
    }
    for name, write in writers.items():
        try:
            write(out / name)
        except OSError as error:
            failures.append(f"{out / name} was not written: {_reason(error)}")
    if failures:
        raise click.ClickException("; ".join(failures))


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
