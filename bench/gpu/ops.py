"""Each operation alone on the device: every backend that has passed its tests, and torch's best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.byte_model import OPS, op_bytes
from bench.gpu import limits
from bench.gpu.device import l2_bytes
from bench.gpu.timing import Call, Clock, Timed, interleave
from bench.op_calls import describe_once, make_lists, ours, torch_call
from bench.workloads import DTYPES, Workload
from sam_kernels._dispatch import BACKENDS, reason_missing

__all__ = ["TORCH", "backends_on", "measure", "memory_needed", "speed"]

TORCH = "torch"
CACHES = 3  # the buffers of one round are this many times the second-level cache
MAX_SETS = 64
FEW_SETS = 4  # where the cache cannot be outgrown


def backends_on(device: str, say: Callable[[str], None]) -> list[str]:
    """Those with kernels for the device, and torch's best."""
    reasons = {name: reason_missing(name, torch.device(device).type) for name in BACKENDS}
    for name, reason in reasons.items():
        if reason is not None:
            say(f"left out: backend {name}: {reason}")
    return [*(name for name, reason in reasons.items() if reason is None), TORCH]


def memory_needed(op: str, workload: Workload, dtype_name: str) -> int:
    """Bytes: the lists, and temporaries of an implementation that widens them: six of float32 at most, or one of float64 for a norm."""
    temporaries = 8 if len(OPS[op].lists) == 1 else 24
    return workload.numel * (len(OPS[op].lists) * DTYPES[dtype_name].itemsize + temporaries)


def _in_turn(run: Callable[[Any], object], sets: Sequence[Any]) -> Call:
    counter = itertools.count()
    return lambda: run(sets[next(counter) % len(sets)])


def measure(
    workload: Workload,
    op: str,
    dtype_name: str,
    backends: Sequence[str],
    *,
    clock: Clock,
    device: str,
    copy_gbps: float,
    seconds: float,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Rows of the result file. ``regime`` is "cached" where the buffers fit the cache whatever one does: then launching is what counts."""
    dtype = DTYPES[dtype_name]
    set_bytes = workload.numel * dtype.itemsize * len(OPS[op].lists)
    wanted = max(1, math.ceil(CACHES * l2_bytes() / set_bytes))
    sets, regime = (wanted, "memory") if wanted <= MAX_SETS else (FEW_SETS, "cached")
    plain = [make_lists(op, workload.shapes, dtype, device) for _ in range(sets)]
    calls: dict[str, Call] = {}
    for name in backends:
        # A list keeps its description with it, and each backend has a way of its own to describe one.
        run, lists = (torch_call(op), plain) if name == TORCH else (ours(op, name), [describe_once(given) for given in plain])
        call = _in_turn(run, lists)
        try:
            with torch.no_grad():
                call()
        except Exception as error:  # out of memory, a kernel that does not compile: the others are still of interest
            say(f"left out: {op} {workload.name} {dtype_name} on {name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        calls[name] = call
    with torch.no_grad():
        timed = interleave(clock, calls, seconds=seconds)
    nbytes = op_bytes(op, workload.numel, dtype.itemsize)
    row = {"kind": "op", "op": op, "workload": workload.name, "dtype": dtype_name, "base": None}
    size = {"n_tensors": workload.n_tensors, "numel": workload.numel, "bytes": nbytes}
    for name, found in timed.items():
        issue = limits.issue_ms(op, name, dtype_name, workload.numel)
        yield row | {"backend": name} | size | speed(found, nbytes, copy_gbps) | {"regime": regime, "sets": sets, "issue_ms": issue}


def speed(timed: Timed, nbytes: int, copy_gbps: float) -> dict[str, Any]:
    """The measured part of a row, of operations and of steps."""
    q = timed.device
    gbps = nbytes / q.ms_50 / 1e6
    return {
        **{"ms_20": q.ms_20, "ms_50": q.ms_50, "ms_80": q.ms_80, "host_us": timed.host_us, "samples": len(timed.device_ms)},
        **{"gbps": gbps, "copy_gbps": copy_gbps, "pct_copy": 100 * gbps / copy_gbps, "pct_floor": None, "floor": None},
    }
