"""Files of a run on a device, written line by line: a run that is cut off keeps every line, a full disk loses only later ones.

A file of rows (``.jsonl``) holds one JSON object a line; :mod:`bench.gpu.results` makes a result of them.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["BENCH", "LOG", "SUMMARY", "TESTS", "Record", "row_of", "writable"]

Row = Mapping[str, Any]
BENCH, TESTS, LOG, SUMMARY = "bench.jsonl", "tests.jsonl", "log.txt", "summary.txt"
MOST_BYTES = 3_900_000  # of a file


def writable(asked: Path, say: Callable[[str], None]) -> Path | None:
    """The folder, made if need be. If it cannot be written: a temporary one, and None if there is no such place either."""
    for folder in (asked, None):
        try:
            made = Path(tempfile.mkdtemp(prefix="sam_kernels-")) if folder is None else folder
            made.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=made):
                return made.resolve()
        except OSError as error:
            instead = "a temporary folder" if folder else "no file"
            place = folder or tempfile.gettempdir()
            say(f"{place} cannot be written ({error.strerror}): results go to {instead}; choose another with OUT=folder")
    return None


class Record:
    """Appends lines to files of a folder; from several threads. After an error a file gets no further line, and one line says so."""

    def __init__(self, folder: Path | None, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self._say = say
        self._lock = threading.Lock()
        self._ended: set[str] = set()

    def start(self, names: Iterable[str]) -> None:
        """Empties the files: what an earlier run left is not this one's."""
        for name in names if self.folder is not None else ():
            try:
                (self.folder / name).unlink(missing_ok=True)  # type: ignore[operator]  # it is not None here
            except OSError as error:
                self._end(name, f"cannot be replaced ({error.strerror})")

    def log(self, line: str) -> None:
        self.line(LOG, line)

    def row(self, row: Row) -> None:
        """Keeps it in memory too."""
        with self._lock:
            self.rows.append(dict(row))
        self.line(TESTS if row["kind"] in ("test", "phase") else BENCH, json.dumps(row))

    def line(self, name: str, line: str) -> None:
        with self._lock:
            if self.folder is None or name in self._ended:
                return
            path = self.folder / name
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(f"{line}\n")
                    size = file.tell()
            except OSError as error:
                instead = "the tables at the end are complete; free space, or choose OUT=folder"
                self._end(name, f"cannot be written ({error.strerror}): {instead}")
                return
            if size > MOST_BYTES:
                self._end(name, f"has {MOST_BYTES / 1e6:.1f} MB and gets no further lines")

    def _end(self, name: str, words: str) -> None:
        self._ended.add(name)
        self._say(f"{name} {words}")


def row_of(line: str) -> dict[str, Any] | None:
    """The row that a line of output is, if it is one."""
    if not line.startswith('{"kind": '):
        return None
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return found
