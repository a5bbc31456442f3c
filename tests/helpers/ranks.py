"""A function on several gloo processes, as one call of an ordinary test. A process that fails or hangs fails the test; none outlives it.

Importing torch would be most of what such a process costs. Two servers import it once for all calls of a test process, and fork a process
for each rank of a call: even ranks from one server, odd ranks from the other. So neighbouring ranks differ in their addresses and in the
order of their sets, as processes that are started one by one do, and a collective in the order of a set does not pass unseen.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

__all__ = ["RankFailed", "on_one_rank", "on_ranks", "one_at_a_time"]

one_at_a_time = pytest.mark.xdist_group("ranks")  # two processes each: they would share the cores with each other
SERVERS = 2
# What the modules of the tests import only when they run.
IMPORTED = ("sam_kernels", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor.parallel")
KILL = b""


class RankFailed(RuntimeError):
    """A rank raised, or was ended by a signal."""


@contextlib.contextmanager
def on_one_rank(folder: Path) -> Iterator[None]:
    """This process as the only rank of a default process group. What was made with the group must be out of use at the end.

    A model of DistributedDataParallel that outlives ``destroy_process_group`` ends the group when it is collected itself, with the
    interpreter's lock held: it waits for gloo's threads, and one of them waits for the lock if it still holds the future of a hook
    written in Python.
    """
    folder.mkdir(parents=True, exist_ok=True)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        gc.collect()
        if distributed.is_initialized():
            distributed.destroy_process_group()


def on_ranks(function: Callable[..., Any], folder: Path, *args: Any, ranks: int = 2, timeout: float = 240.0) -> list[Any]:
    """What ``function(rank, *args)`` returns on each rank, rank by rank: anything that ``torch.save`` takes.

    ``function`` is one of a module, and finds the default process group initialised. Raises RankFailed with the traceback of the rank that
    failed first or its signal, TimeoutError after ``timeout`` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    call = pickle.dumps((function, args))
    servers = _servers()
    for rank in range(ranks):
        servers[rank % SERVERS].send_bytes(pickle.dumps((rank, ranks, folder, function.__module__, call)))
    deadline, left = time.monotonic() + timeout, set(range(ranks))
    try:
        while left:
            ended = _ended(servers, max(0.0, deadline - time.monotonic()))
            left -= ended.keys()
            if failed := {rank: status for rank, status in ended.items() if status != 0}:
                first = min(failed, key=lambda rank: failed[rank])  # a signal before an exception, which may be about the connection to it
                raise RankFailed(f"{function.__name__} on rank {first} of {ranks}: {_reason(folder, first, failed[first])}")
            if left and time.monotonic() >= deadline:
                raise TimeoutError(f"{function.__name__} on {ranks} ranks has not ended within {timeout} s")
    finally:
        if left:
            for server in servers:
                server.send_bytes(KILL)
        while left:
            left -= _ended(servers, None).keys()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _ended(servers: list[Connection], timeout: float | None) -> dict[int, int]:
    """The ranks that have ended, with their exit statuses: minus the signal's number where it was a signal."""
    return dict(server.recv() for server in connection.wait(servers, timeout))  # type: ignore[union-attr]


def _reason(folder: Path, rank: int, status: int) -> str:
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return (folder / f"{rank}.txt").read_text(encoding="utf-8") if (folder / f"{rank}.txt").exists() else f"exit status {status}"


@cache
def _servers() -> list[Connection]:
    """One end of a pipe to each server, which ends when this end is closed: at the latest when this process is no more."""
    context, ends = get_context("spawn"), []
    for i in range(SERVERS):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), name=f"ranks {i}")
        process.start()
        theirs.close()
        atexit.register(ours.close)  # before multiprocessing waits for the server
        ends.append(ours)
    for end in ends:
        end.recv()
    return ends


def _serve(calls: Connection) -> None:
    for name in IMPORTED:
        import_module(name)
    calls.send("ready")
    running: dict[Any, tuple[int, BaseProcess]] = {}
    while True:
        for ready in connection.wait([calls, *running]):
            if ready in running:
                rank, process = running.pop(ready)
                process.join()
                calls.send((rank, process.exitcode))
                continue
            try:
                message = calls.recv_bytes()
            except EOFError:
                message = None
            if not message:
                for _, process in running.values():
                    process.kill()
                if message is None:
                    return
                continue
            rank, ranks, folder, module, call = pickle.loads(message)
            with contextlib.suppress(Exception):  # the rank raises it
                import_module(module)
            process = get_context("fork").Process(target=_on_rank, args=(rank, ranks, folder, call))
            process.start()
            running[process.sentinel] = rank, process


def _on_rank(rank: int, ranks: int, folder: Path, call: bytes) -> None:
    try:
        function, args = pickle.loads(call)
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        try:
            torch.save(function(rank, *args), folder / f"{rank}.pt")
            distributed.barrier()
        finally:
            distributed.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        raise SystemExit(1) from None
