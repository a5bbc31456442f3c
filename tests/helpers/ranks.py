"""A function on several gloo processes, as one call of an ordinary test. A process that fails or hangs fails the test; none outlives it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import start_processes

__all__ = ["on_ranks", "one_at_a_time"]

one_at_a_time = pytest.mark.xdist_group("ranks")  # two processes each: they would share the cores with each other


def on_ranks(function: Callable[..., Any], folder: Path, *args: Any, ranks: int = 2, timeout: float = 240.0) -> list[Any]:
    """What ``function(rank, *args)`` returns on each rank, rank by rank: anything that ``torch.save`` takes.

    ``function`` is one of a module, and finds the default process group initialised. Raises what a rank raised, TimeoutError after
    ``timeout`` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = start_processes(_on_rank, (function, folder, ranks, args), nprocs=ranks, join=False, start_method="spawn")
    deadline = time.monotonic() + timeout
    try:
        while not context.join(timeout=max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{function.__name__} on {ranks} ranks has not ended within {timeout} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _on_rank(rank: int, function: Callable[..., Any], folder: Path, ranks: int, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        torch.save(function(rank, *args), folder / f"{rank}.pt")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
