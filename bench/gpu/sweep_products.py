"""Other tiles for the products of linear layers: the defaults in ``per_sample/_config.py`` are set from this."""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from bench.gpu.gate import Gate
from bench.gpu.products import OP, PRECISIONS, flops
from bench.gpu.sweep import HOST_SECONDS, best
from bench.gpu.timing import Clock
from sam_kernels import use_backend
from sam_kernels._dispatch import reason_missing
from sam_kernels.functional import per_sample

__all__ = ["choices", "lines", "run"]

TOKENS, FEATURES, GROUPS = 1024, (1024, 4096), 8
SIDES = {"gram": ((64, 64), (128, 128)), "direct": ((64, 64), (128, 64), (128, 128), (128, 256))}
WARPS = (2, 4, 8)  # with two, wgmma is out of reach and the older instruction is used: tf32 then needs no transposing
STAGES = (3, 4)


def _config() -> Any:
    """Imported late: without triton there is none."""
    return importlib.import_module("sam_kernels.backends.triton.per_sample._config")


def choices(method: str, kind: str) -> list[Any]:
    """Tiles worth trying: 16 to 128 sums a thread for each tile, and buffers that fit a block of an H100."""
    depths = (16, 32) if kind == "ieee" else (32,) if kind == "tf32" else (32, 64)
    itemsize = 2 if kind == "bf16" else 4
    found = []
    for (rows, columns), depth, warps, stages in itertools.product(SIDES[method], depths, WARPS, STAGES):
        fits = (rows + columns) * depth * itemsize * stages <= 227 * 1024
        if fits and 16 <= rows * columns // (32 * warps) <= 128:
            found.append(_config().Tile(rows, columns, depth, warps, stages))
    return found


def run(clock: Clock, device: str, gate: Gate, deadline: float) -> Iterator[dict[str, Any]]:
    """Rows of kind "sweep_product": the best tiles of each form and precision, and the default."""
    reason = reason_missing("triton", torch.device(device).type)
    if reason is not None or not (device == "cpu" or gate.allows(OP, "triton")):
        print(f"left out: sweep of products: {reason or 'no green test'}")
        return
    for method, (name, (dtype, precision)) in itertools.product(SIDES, PRECISIONS.items()):
        if time.monotonic() > deadline:
            print(f"left out: sweep of products {method} {name}: out of time")
            continue
        yield from _rows(clock, device, method, name, dtype, precision, deadline)


def _rows(
    clock: Clock, device: str, method: str, name: str, dtype: torch.dtype, precision: str, deadline: float
) -> Iterator[dict[str, Any]]:
    tokens, (d, p), m = (TOKENS, FEATURES, GROUPS) if device != "cpu" else (20, (32, 32), 1)
    a, g = (torch.randn((m, tokens, size), dtype=dtype, device=device) for size in (d, p))
    norms, default = torch.zeros(m, dtype=torch.float64, device=device), _config().TILES[method][name][0]

    def call() -> None:
        with use_backend("triton"):
            per_sample.linear_square_norms_(norms, a, g, method=method, precision=precision)

    def times(tile: Any, samples: int) -> float:
        try:
            with _config().tuned(method, name, tile):
                call()
                return clock.turn(call, samples, 1, samples * HOST_SECONDS).device.ms_50
        except Exception as error:  # registers, shared memory: too much for a processor
            print(f"left out: {method} {name} {tile}: {type(error).__name__}")
            return float("inf")

    tried = choices(method, name) if device != "cpu" else choices(method, name)[:2]
    found = dict(best(times, tried, lambda: time.monotonic() > deadline))
    if default not in found:
        found[default] = times(default, 20)
    work = m * flops(method, tokens, d, p)
    for rank, (tile, ms) in enumerate(sorted(found.items(), key=lambda pair: pair[1]), 1):
        cut = f"{tile.rows}×{tile.columns}×{tile.depth}/{tile.num_warps}/{tile.num_stages}"
        what = {"kind": "sweep_product", "backend": "triton", "op": OP, "kernel": method, "dtype": name, "rank": rank, "cut": cut}
        yield what | {"is_default": tile == default, "ms_50": ms, "tflops": work / ms / 1e9}


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a form and precision, the best first."""
    cases: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["kind"] == "sweep_product":
            cell = f"{row['cut']} {row['ms_50']:.4f} ({row['tflops']:.0f})"
            cases.setdefault((row["kernel"], row["dtype"]), []).append(f"[{cell}]" if row["is_default"] else cell)
    found = [f"products, T {TOKENS}, d p {FEATURES}: rows×columns×depth/warps/stages, ms (TFLOP/s); [default]"] if cases else []
    return [*found, *(f"  {method:<6} {dtype:<4} {'  '.join(cells)}" for (method, dtype), cells in cases.items())]
