"""What takes long to make and depends on its sources alone: made once, by whichever process comes first, and kept between runs.

Values are in build/test-cache, each under the hash of all it was made from: sources, compiler, flags. ``make clean`` removes them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

__all__ = ["FOLDER", "ROOT", "digest", "digest_of_files", "made_once", "made_together", "with_included"]

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "test-cache"

Work = TypeVar("Work")
Made = TypeVar("Made")


def digest(*parts: object) -> str:
    """Return the hash of the representations of ``parts`` and of this Python's version."""
    return hashlib.sha256("\0".join(map(repr, (platform.python_version(), *parts))).encode()).hexdigest()


def digest_of_files(paths: Iterable[Path]) -> str:
    """Return the hash of the contents of files and of their names, without their folders."""
    return digest(*((path.name, path.read_bytes()) for path in sorted(paths)))


def with_included(source: Path, folder: Path) -> list[Path]:
    """Return ``source`` and every file that it includes, itself or through others, from ``folder`` or from beside the including file."""
    found: list[Path] = []
    missing = [source]
    while missing:
        path = missing.pop()
        if path not in found:
            found.append(path)
            included = re.findall(r'^\s*#\s*include\s+[<"]([^">]+)[">]', path.read_text(encoding="utf-8"), re.MULTILINE)
            candidates = [place / name for name in included for place in (folder, path.parent)]
            missing += [candidate for candidate in candidates if candidate.is_file()]
    return found


def made_once(kind: str, key: str, make: Callable[[], Made], folder: Path = FOLDER) -> Made:
    """Return what ``make`` returned for this key, in this process or another, now or in an earlier run."""
    (value,) = made_together(kind, [key], lambda key: key, lambda key: make(), folder)
    return value


def made_together(
    kind: str, work: Sequence[Work], key: Callable[[Work], str], make: Callable[[Work], Made], folder: Path = FOLDER
) -> list[Made]:
    """Return ``make`` of each piece of work, in the order of ``work``.

    Processes that need the same values at the same time share the work: each makes what nobody has made and nobody is making, and
    waits only when nothing else is left. What ``make`` raises is raised here, and nothing is kept of it.
    """
    place = folder / kind
    place.mkdir(parents=True, exist_ok=True)
    paths = [place / key(piece) for piece in work]
    found: dict[int, Made] = {}
    while missing := [i for i in range(len(work)) if i not in found]:
        before = len(found)
        for i in missing:
            with _held(paths[i], wait=False) as is_ours:
                if is_ours or paths[i].exists():
                    found[i] = _made(paths[i], work[i], make)
        if len(found) == before:
            with _held(paths[missing[0]], wait=True):
                pass
    return [found[i] for i in range(len(work))]


def _made(path: Path, piece: Work, make: Callable[[Work], Made]) -> Made:
    if path.exists():
        return pickle.loads(path.read_bytes())  # type: ignore[no-any-return]
    value = make(piece)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(pickle.dumps(value))
    unfinished.replace(path)
    return value


@contextmanager
def _held(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process alone holds the lock of a value. The system releases the lock of a process that ends."""
    if not wait and path.exists():
        yield False
        return
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
