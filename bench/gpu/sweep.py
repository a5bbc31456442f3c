"""How each kernel's work is best cut on this device: chunk, block and warps, tried on 10^8 elements; the defaults are set from this.

Compiling is most of the work: some hundred variants of a second each. Processes of their own do it first, side by side, into triton's cache
on disk; the measurement then only loads.
"""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.byte_model import op_bytes
from bench.gpu.gate import Gate
from bench.gpu.timing import Clock
from bench.op_calls import describe_once, make_lists, ours
from bench.workloads import DTYPES

__all__ = ["KERNELS", "Choice", "best", "choices", "compile_share", "lines", "run", "short_lines"]

CHUNKS = (4096, 8192, 16384, 32768, 65536)
BLOCKS = (512, 1024, 2048, 4096)
WARPS = (4, 8)
KERNELS = {  # those of every step first, where time is short
    "norm": "grad_norm",
    "perturb": "perturb_",
    "sgd": "sgd_step_",
    "adamw": "adamw_step_",
    "copy": "restore_",
    "direction": "direction_norm_",
    "random": "random_perturb_",
}
LEAST_BLOCK = {"random": 2048}  # a tile of random numbers
NUMEL = 100_000_000
FINALISTS, WINNERS = 6, 3
COMPILE_SHARE = 0.6  # of the time, at most
HOST_SECONDS = 3e-4  # to launch one call, generously: the queue is filled before a sample begins
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Choice:
    chunk: int
    block: int
    num_warps: int

    def __str__(self) -> str:
        return f"chunk {self.chunk}, block {self.block}, {self.num_warps} warps"


def choices(kernel: str = "") -> list[Choice]:
    """What a kernel can be cut into."""
    found = [Choice(*parts) for parts in itertools.product(CHUNKS, BLOCKS, WARPS)]
    return [choice for choice in found if LEAST_BLOCK.get(kernel, 0) <= choice.block <= choice.chunk]


def _variants(dtypes: Sequence[str]) -> list[tuple[str, str, Choice]]:
    return [(kernel, dtype, choice) for kernel in KERNELS for dtype in dtypes for choice in choices(kernel)]


def default_of(kernel: str) -> Choice:
    config = _configs()[kernel]
    return Choice(config.chunk, config.block, config.num_warps)


def _configs() -> dict[str, Any]:
    """Imported late: without triton there is nothing to configure, and the rest of the benchmark need not know."""
    found: dict[str, Any] = importlib.import_module("sam_kernels.backends.triton._config").CONFIGS
    return found


def best(times: Callable[[Choice, int], float], candidates: Sequence[Choice], is_over: Callable[[], bool]) -> list[tuple[Choice, float]]:
    """The winners with their milliseconds: every candidate in a few samples, then the finalists in more. ``times``: (choice, samples)."""
    found: dict[Choice, float] = {}
    for choice in candidates:
        if is_over():
            break
        found[choice] = times(choice, 5)
    for choice in sorted(found, key=lambda choice: found[choice])[:FINALISTS]:
        found[choice] = times(choice, 20)
    finalists = sorted(found, key=lambda choice: found[choice])[:FINALISTS]
    return sorted(((choice, found[choice]) for choice in finalists), key=lambda pair: pair[1])[:WINNERS]


def _call(op: str, dtype: torch.dtype, numel: int, device: str) -> Callable[[], object]:
    lists = describe_once(make_lists(op, ((numel,),), dtype, device))
    run = ours(op, "triton")
    return lambda: run(lists)


def _use(kernel: str, choice: Choice) -> None:
    module = importlib.import_module("sam_kernels.backends.triton._config")
    module.CONFIGS[kernel] = replace(module.CONFIGS[kernel], **asdict(choice))


def compile_share(share: int, of: int, dtypes: Sequence[str]) -> None:
    """Compiles every ``of``-th variant by running it on little."""
    for i, (kernel, dtype, choice) in enumerate(_variants(dtypes)):
        if i % of == share:
            _use(kernel, choice)
            try:
                _call(KERNELS[kernel], DTYPES[dtype], 2 * choice.chunk, "cuda")()
            except Exception as error:  # too much for a processor: the measurement says so
                print(f"{kernel} {dtype} {choice}: {type(error).__name__}")
    torch.cuda.synchronize()


def _compile(dtypes: Sequence[str], seconds: float) -> None:
    count = max(1, min(14, (os.cpu_count() or 1) - 2))
    code = "import sys; from bench.gpu.sweep import compile_share as c; c(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])"
    end = time.monotonic() + seconds
    workers = [subprocess.Popen([sys.executable, "-c", code, str(i), str(count), *dtypes], cwd=ROOT) for i in range(count)]
    for worker in workers:
        try:
            worker.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def run(clock: Clock, device: str, gate: Gate, deadline: float, *, dtypes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of kind "sweep": a kernel's winners and its default, in milliseconds and GB/s."""
    if device != "cpu":
        _compile(dtypes, COMPILE_SHARE * (deadline - time.monotonic()))
    rows = []
    for kernel, dtype in itertools.product(KERNELS, dtypes):
        if time.monotonic() > deadline or not gate.allows(KERNELS[kernel], "triton"):
            print(f"left out: sweep of {kernel} {dtype}: {'out of time' if time.monotonic() > deadline else 'no green test'}")
            continue
        rows += list(_rows(clock, device, kernel, dtype, deadline))
    return rows


def _rows(clock: Clock, device: str, kernel: str, dtype: str, deadline: float) -> Iterator[dict[str, Any]]:
    op, numel = KERNELS[kernel], NUMEL if device != "cpu" else 4096
    before = default_of(kernel)
    call = _call(op, DTYPES[dtype], numel, device) if device != "cpu" else lambda: None

    def times(choice: Choice, samples: int) -> float:
        _use(kernel, choice)
        try:
            call()
            return clock.turn(call, samples, 1, samples * HOST_SECONDS).device.ms_50
        except Exception as error:  # registers, shared memory: too much for a processor
            print(f"left out: {kernel} {dtype} {choice}: {type(error).__name__}")
            return float("inf")

    try:
        found = dict(best(times, choices(kernel), lambda: time.monotonic() > deadline))
        found.setdefault(before, times(before, 20))
    finally:
        _use(kernel, before)
    nbytes = op_bytes(op, numel, DTYPES[dtype].itemsize)
    for rank, (choice, ms) in enumerate(sorted(found.items(), key=lambda pair: pair[1]), 1):
        size = {"numel": numel, "bytes": nbytes, "ms_50": ms, "gbps": nbytes / ms / 1e6}
        yield (
            {"kind": "sweep", "op": op, "kernel": kernel, "dtype": dtype, "rank": rank}
            | asdict(choice)
            | {"is_default": choice == before}
            | size
        )


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a kernel and dtype: its winners, and what the default costs beside the first of them."""
    found = ["sweep (10^8 elements): chunk/block/warps ms, the best first; the default in brackets"]
    for kernel, dtype in dict.fromkeys((row["kernel"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["kernel"], row["dtype"]) == (kernel, dtype)]
        cells = [f"{row['chunk'] // 1024}k/{row['block']}/{row['num_warps']} {row['ms_50']:.4f}" for row in mine]
        cells = [f"[{cell}]" if row["is_default"] else cell for cell, row in zip(cells, mine, strict=True)]
        default = next((row["ms_50"] for row in mine if row["is_default"]), mine[0]["ms_50"])
        beside = f"{mine[0]['gbps']:.0f} GB/s, default +{100 * (default / mine[0]['ms_50'] - 1):.1f} %"
        found.append(f"  {kernel:<8} {dtype}  {'  '.join(cells)}  {beside}")
    return found


def short_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a kernel: the winner of each dtype, and how much slower the default is."""
    found = ["sweep: the best chunk/block/warps, and what the default costs beside it"]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        cells = []
        for dtype in dict.fromkeys(row["dtype"] for row in rows if row["kernel"] == kernel):
            mine = [row for row in rows if (row["kernel"], row["dtype"]) == (kernel, dtype)]
            first, default = mine[0], next((row for row in mine if row["is_default"]), mine[0])
            slower = 100 * (default["ms_50"] / first["ms_50"] - 1)
            cut = f"{first['chunk'] // 1024}k/{first['block']}/{first['num_warps']}"
            cells.append(f"{dtype} {cut:<12} {first['ms_50']:.4f} ms {first['gbps']:>5.0f} GB/s, default +{slower:.1f} %")
        found.append(f"  {kernel:<10} {'   '.join(cells)}")
    return found
