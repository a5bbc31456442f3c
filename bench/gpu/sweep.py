"""How each kernel's work is best cut on this device, tried on 10^8 elements, backend by backend; the defaults are set from this.

What can be varied is the backend's own: ``sweep_native``, ``sweep_triton``, two modules with the same functions.
"""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, Protocol

import torch

from bench.byte_model import op_bytes
from bench.gpu.gate import Gate
from bench.gpu.timing import Clock
from bench.op_calls import describe_once, make_lists, ours
from bench.workloads import DTYPES

__all__ = ["KERNELS", "Tuner", "best", "call_of", "lines", "run", "short_lines", "tuners"]

KERNELS = {  # those of every step first, where time is short
    "norm": "grad_norm",
    "perturb": "perturb_",
    "sgd": "sgd_step_",
    "adamw": "adamw_step_",
    "direction": "direction_norm_",
    "random": "random_perturb_",
    "copy": "restore_",
}
NUMEL = 100_000_000
FINALISTS, WINNERS = 6, 3
COMPILE_SHARE = 0.6  # of the time, at most
HOST_SECONDS = 3e-4  # to launch one call, generously: the queue is filled before a sample begins


class Tuner(Protocol):
    """A module. A choice is a dataclass whose ``str`` is short."""

    BACKEND: str

    def reason_missing(self) -> str | None: ...

    def choices(self, kernel: str) -> list[Any]: ...

    def default_of(self, kernel: str) -> Any: ...

    def using(self, kernel: str, choice: Any) -> AbstractContextManager[None]: ...

    def compile_all(self, dtypes: Sequence[str], seconds: float) -> None: ...


def tuners() -> list[Tuner]:
    """The one first that compiles nothing."""
    modules: list[Any] = [importlib.import_module(f"bench.gpu.sweep_{backend}") for backend in ("native", "triton")]
    return modules


def call_of(op: str, backend: str, dtype: torch.dtype, numel: int, device: str) -> Callable[[], object]:
    lists = describe_once(make_lists(op, ((numel,),), dtype, device))
    run = ours(op, backend)
    return lambda: run(lists)


def best(times: Callable[[Any, int], float], candidates: Sequence[Any], is_over: Callable[[], bool]) -> list[tuple[Any, float]]:
    """The winners with their milliseconds: every candidate in a few samples, then the finalists in more. ``times``: (choice, samples)."""
    found: dict[Any, float] = {}
    for choice in candidates:
        if is_over():
            break
        found[choice] = times(choice, 5)
    for choice in sorted(found, key=lambda choice: found[choice])[:FINALISTS]:
        found[choice] = times(choice, 20)
    finalists = sorted(found, key=lambda choice: found[choice])[:FINALISTS]
    return sorted(((choice, found[choice]) for choice in finalists), key=lambda pair: pair[1])[:WINNERS]


def run(clock: Clock, device: str, gate: Gate, deadline: float, *, dtypes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of kind "sweep": a kernel's winners and its default, in milliseconds and GB/s."""
    for tuner in tuners():
        if (reason := tuner.reason_missing()) is not None:
            print(f"left out: sweep of {tuner.BACKEND}: {reason}")
            continue
        if device != "cpu":
            tuner.compile_all(dtypes, COMPILE_SHARE * (deadline - time.monotonic()))
        for kernel, dtype in itertools.product(KERNELS, dtypes):
            if time.monotonic() > deadline or not gate.allows(KERNELS[kernel], tuner.BACKEND):
                reason = "out of time" if time.monotonic() > deadline else "no green test"
                print(f"left out: sweep of {kernel} {dtype} on {tuner.BACKEND}: {reason}")
                continue
            yield from _rows(tuner, clock, device, kernel, dtype, deadline)


def _rows(tuner: Tuner, clock: Clock, device: str, kernel: str, dtype: str, deadline: float) -> Iterator[dict[str, Any]]:
    op, numel = KERNELS[kernel], NUMEL if device != "cpu" else 4096
    default = tuner.default_of(kernel)
    call = call_of(op, tuner.BACKEND, DTYPES[dtype], numel, device) if device != "cpu" else lambda: None

    def times(choice: Any, samples: int) -> float:
        try:
            with tuner.using(kernel, choice):
                call()
                return clock.turn(call, samples, 1, samples * HOST_SECONDS).device.ms_50
        except Exception as error:  # registers, shared memory: too much for a processor
            print(f"left out: {kernel} {dtype} {choice} on {tuner.BACKEND}: {type(error).__name__}")
            return float("inf")

    found = dict(best(times, tuner.choices(kernel), lambda: time.monotonic() > deadline))
    if default not in found:
        found[default] = times(default, 20)
    nbytes = op_bytes(op, numel, DTYPES[dtype].itemsize)
    what = {"kind": "sweep", "backend": tuner.BACKEND, "op": op, "kernel": kernel, "dtype": dtype}
    for rank, (choice, ms) in enumerate(sorted(found.items(), key=lambda pair: pair[1]), 1):
        size = {"numel": numel, "bytes": nbytes, "ms_50": ms, "gbps": nbytes / ms / 1e6}
        yield what | {"rank": rank, "cut": str(choice), **asdict(choice), "is_default": choice == default} | size


def _slower(mine: Sequence[Mapping[str, Any]]) -> str:
    """What the default costs beside the first."""
    default = next((row["ms_50"] for row in mine if row["is_default"]), mine[0]["ms_50"])
    return f"{mine[0]['gbps']:.0f} GB/s, default +{100 * (default / mine[0]['ms_50'] - 1):.1f} %"


def _cases(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]]:
    """{(backend, kernel): {dtype: rows, the best first}}"""
    found: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for row in (row for row in rows if row["kind"] == "sweep"):
        found.setdefault((row["backend"], row["kernel"]), {}).setdefault(row["dtype"], []).append(row)
    return found


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a kernel and dtype: its winners, and what the default costs beside the first of them."""
    found = ["sweep (10^8 elements): chunk/block/warps or chunk/blocks a processor, and ms; the best first, the default in brackets"]
    for (backend, kernel), by_dtype in _cases(rows).items():
        for dtype, mine in by_dtype.items():
            cells = [f"{row['cut']} {row['ms_50']:.4f}" for row in mine]
            cells = [f"[{cell}]" if row["is_default"] else cell for cell, row in zip(cells, mine, strict=True)]
            found.append(f"  {backend} {kernel:<9} {dtype}  {'  '.join(cells)}  {_slower(mine)}")
    return found


def short_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a kernel: the winner of each dtype, and how much slower the default is."""
    found = ["sweep: the best chunk/blocks a processor (native), chunk/block/warps (triton), and what the default costs beside it"]
    for (backend, kernel), by_dtype in _cases(rows).items():
        cells = [f"{dtype} {mine[0]['cut']:<10} {mine[0]['ms_50']:.4f} ms {_slower(mine)}" for dtype, mine in by_dtype.items()]
        found.append(f"  {backend} {kernel:<9} {'   '.join(cells)}")
    return found
