"""The short tables a run ends with: whoever sees only the end of the output sees these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.byte_model import OPS, STEP_OPS
from bench.gpu.ops import TORCH
from bench.gpu.steps import COMBINATIONS, GRAPH, LOOPS, REFERENCE
from bench.gpu.workloads import GPU_WORKLOADS
from bench.workloads import DTYPES

__all__ = ["bandwidth_line", "bench_lines", "launch_rows", "op_rows", "step_rows"]

Row = Mapping[str, Any]
OURS = REFERENCE.partition("/")[2]
FULL = next(iter(GPU_WORKLOADS))  # with every operation; the others with those of a step
OF_STEPS = {op for ops in STEP_OPS.values() for op in ops}


def bandwidth_line(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{kind} {value['gbps']:.0f} GB/s ({value['by']})" for kind, value in found.items())


def op_rows(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, dict[str, Row]]]:
    """{(workload, op): {dtype: {backend: row}}} in the order of the tables."""
    found: dict[tuple[str, str], dict[str, dict[str, Row]]] = {}
    for workload in GPU_WORKLOADS:
        for op in OPS:
            for row in rows:
                if (row["kind"], row.get("workload"), row["op"]) == ("op", workload, op):
                    found.setdefault((workload, op), {}).setdefault(row["dtype"], {})[row["backend"]] = row
    return found


def step_rows(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """{(workload, base, dtype): {provider: row}} in the order of the tables."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for workload in GPU_WORKLOADS:
        for base, dtype in COMBINATIONS:
            for row in rows:
                if (row["kind"], row.get("workload"), row.get("base"), row["dtype"]) == ("step", workload, base, dtype):
                    found.setdefault((workload, base, dtype), {})[row["backend"]] = row
    return found


def launch_rows(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == "launches":
            found.setdefault((row["workload"], row["base"], row["dtype"]), {})[row["backend"]] = row
    return found


def _times(slower: Row | None, faster: Row | None) -> str:
    return "–" if slower is None or faster is None else f"{slower['ms_50'] / faster['ms_50']:.1f}×"


def _op_cell(by_backend: Mapping[str, Row]) -> str:
    mine = by_backend.get(OURS)
    if mine is None:
        return f"{'–':>31}"
    beside = f"{_times(by_backend.get(TORCH), mine):>6} {_times(by_backend.get('foreach'), mine):>6}"
    return f"{mine['ms_50']:>8.4f} {mine['gbps']:>5.0f} {mine['pct_copy']:>3.0f}% {mine['host_us']:>4.0f} {beside}"


def bench_lines(found: Mapping[str, Any]) -> list[str]:
    """Operations, then steps: a line a workload and operation, a line a workload and base."""
    rows = found["rows"]
    result = [f"{found['gpu']}: {bandwidth_line(found['bandwidth'])}; gate {found['gate'].partition(':')[0]}"]
    heads = "  ".join(f"{dtype}: ms GB/s copy host-µs torch foreach".rjust(38) for dtype in DTYPES)
    result.append(f"{'operation (' + OURS + ')':<24}{heads}")
    for (workload, op), by_dtype in op_rows(rows).items():
        if workload != FULL and op not in OF_STEPS:
            continue
        result.append(f"{workload:<10} {op:<12} " + "  ".join(f"{_op_cell(by_dtype.get(dtype, {})):>38}" for dtype in DTYPES))
    launched = launch_rows(rows)
    heads = f"{'ms':>8} {'host-µs':>8} {'graph ms':>9} {'loop foreach':>13} {'fused':>7} {'kernels':>8} copies fills"
    result.append(f"{'whole step':<24} {heads}")
    for case, by_provider in step_rows(rows).items():
        mine, graph = by_provider.get(REFERENCE), by_provider.get(GRAPH)
        if mine is None:
            continue
        counted = launched.get(case, {}).get(REFERENCE)
        counts = f"{counted['kernels']:>8} {counted['copies']:>6} {counted['fills']:>5}" if counted else f"{'–':>8}"
        ratios = [_times(by_provider.get(name), mine) for name in LOOPS]
        replayed = "–" if graph is None else f"{graph['ms_50']:.4f}"
        times = f"{mine['ms_50']:>8.4f} {mine['host_us']:>8.0f} {replayed:>9} {ratios[0]:>13} {ratios[1]:>7}"
        result.append(f"{case[0]:<10} {case[1]:<6} {case[2]:<6} {times} {counts}")
    tiny = launched.get(("many_tiny", "sgd", "fp32"), {}).get(REFERENCE)
    if tiny is not None:
        result.append(f"many_tiny, SGD: {tiny['names'][:300]}")
    return result
