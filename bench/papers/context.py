"""What an experiment is given: how large it is to be, where progress is shown, and runs that are made once and on all processors."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from joblib import Memory, Parallel, delayed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from threadpoolctl import threadpool_limits

from bench.page import ROOT

__all__ = ["CACHE", "Context", "digest", "outcome"]

CACHE = Path("out") / "papers_cache"
Run = Callable[..., dict[str, Any]]


class Context:
    """``map`` makes runs; ``quick`` asks for a size of seconds.

    Args:
        quick: for a look at whether everything works.
        console: where progress is shown.
        cache: folder of the runs that have been made, None to keep none. An interrupted experiment starts again where it stopped.
        processes: that make runs, one thread each.
    """

    def __init__(self, quick: bool, console: Console | None = None, *, cache: Path | None = CACHE, processes: int | None = None) -> None:
        self.quick = quick
        self._console = console or Console(quiet=True)
        self._cached = Memory(None if quick else cache, verbose=0).cache(outcome)
        self._processes = 1 if quick else processes or os.cpu_count() or 1

    def tell(self, line: str) -> None:
        self._console.print(f"  {line}", style="dim", highlight=False)

    def map(self, run: Run, jobs: Iterable[Mapping[str, Any]], title: str) -> list[dict[str, Any]]:
        """``run(**job)`` for each job, in their order.

        ``run`` is a function of a module; its arguments and what it returns are values of JSON. A run is read from the cache if it has
        been made with the same arguments and the same code: the package's, and that of ``run``'s module and the modules of ``bench`` that
        it imports, itself or through others.
        """
        given = [json.dumps(job, sort_keys=True) for job in jobs]
        name, code = f"{run.__module__}:{run.__qualname__}", digest(sys.modules[run.__module__])
        parallel = Parallel(n_jobs=self._processes, return_as="generator")
        columns = TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn()
        with Progress(*columns, transient=True, console=self._console) as progress:
            found = parallel(delayed(self._cached)(name, job, code) for job in given)
            return list(progress.track(found, total=len(given), description=title))


def outcome(name: str, job: str, code: str) -> dict[str, Any]:
    """The run of that name. What has been run is known by three strings: objects that are equal need not be pickled alike."""
    module, _, function = name.partition(":")
    torch.set_num_threads(1)
    with threadpool_limits(1):
        found: dict[str, Any] = getattr(importlib.import_module(module), function)(**json.loads(job))
    return found


def digest(module: Any) -> str:
    """Of the package's sources, of the module's and of those in ``bench`` that it imports, itself or through others."""
    files = {path for folder in ("sam_kernels", "csrc") for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h")}
    left = {Path(inspect.getfile(module))}
    while left:
        files.add(path := left.pop())
        left |= imported(path) - files
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def imported(path: Path) -> set[Path]:
    """The files in ``bench`` that this one imports, wherever the statement stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    places = [ROOT / name.replace(".", "/") for name in names if name.startswith("bench.")]
    files = {file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")}
    return {file for file in files if file.exists()}
