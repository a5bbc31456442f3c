"""Runs on all processors, one thread each, under a progress bar."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sam_kernels.cli.output import Ticker

__all__ = ["Pool"]


class Pool:
    """``pool(function, jobs)`` is ``[function(**job) for job in jobs]``; both must be of importable modules."""

    def __init__(self, processes: int, console: Console) -> None:
        self._ticker = Ticker(console)
        self._executor = ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        )
        columns = TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn()
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._found: dict[str, Any] = {}
        self.title = ""

    def __enter__(self) -> Pool:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()
        if kind is not None:  # an interrupt does not wait for runs that take seconds
            for process in list((self._executor._processes or {}).values()):
                process.terminate()
        self._executor.shutdown(cancel_futures=True)

    def __call__(self, function: Callable[..., Any], jobs: Sequence[Mapping[str, Any]]) -> list[Any]:
        """A run that several claims read is made once."""
        names = [f"{function.__module__}:{function.__qualname__}({json.dumps(job, sort_keys=True)})" for job in jobs]
        made: dict[Future[Any], str] = {}
        for name, job in zip(names, jobs, strict=True):
            if name not in self._found and name not in made.values():
                made[self._executor.submit(function, **job)] = name
        task = self._progress.add_task(self.title, total=len(made))
        left = set(made)
        while left:
            done, left = wait(left, timeout=Ticker.every, return_when=FIRST_COMPLETED)
            for each in done:
                self._found[made[each]] = each.result()  # an exception of a run ends the claim
            self._progress.update(task, completed=len(made) - len(left))
            self._ticker.tick(f"  {self.title}: {len(made) - len(left)} of {len(made)} runs")
        self._progress.remove_task(task)
        return [self._found[name] for name in names]
