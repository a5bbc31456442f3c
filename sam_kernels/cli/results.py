"""The folder of a command's results: checked before the work, so that no run is lost to it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import click

__all__ = ["prepare", "save"]

_ROOM = 1 << 20  # bytes: more than a command's files take


def prepare(out: Path, names: Collection[str]) -> None:
    """Make the folder and make sure that the files can be written there. Raises BadParameter with the reason if not."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(bytes(_ROOM))
        for path in (out / name for name in names):
            if path.is_dir():
                raise IsADirectoryError(None, "is a folder", str(path))
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(None, "is write-protected", str(path))
    except OSError as error:
        raise click.BadParameter(f"{error.filename or out}: {_reason(error)}.", param_hint="'--out'") from error


def save(out: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write the files. Raises ClickException, once all were tried, for those that cannot be written."""
    failures = []
    for name, write in writers.items():
        try:
            write(out / name)
        except OSError as error:
            failures.append(f"{out / name} was not written: {_reason(error)}")
    if failures:
        raise click.ClickException("; ".join(failures))


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
