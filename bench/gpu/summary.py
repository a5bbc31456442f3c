"""The short tables a run ends with: whoever sees only the end of the output sees these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.byte_model import OPS, STEP_OPS
from bench.gpu import bars, dispatch
from bench.gpu.ops import TORCH
from bench.gpu.steps import BACKENDS, COMBINATIONS, LOOPS, graph_of, provider
from bench.gpu.workloads import GPU_WORKLOADS
from bench.workloads import DTYPES

__all__ = ["bandwidth_line", "bench_lines", "launch_rows", "op_rows", "step_rows", "verdict_lines", "winner_lines"]

Row = Mapping[str, Any]
FULL = next(iter(GPU_WORKLOADS))  # with every operation; the others with those of a step
AMONG_BARS = "resnet18"  # what is asked of it is a share of a copy's bandwidth, which the bars show
NOT_SHOWN = ("one_1e9", AMONG_BARS)  # of the first the operations would be the full one's again
OURS = [provider(backend) for backend in BACKENDS]
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
    """Of each of ours; then how many times longer torch takes than the faster one."""
    mine = {backend: by_backend[backend] for backend in BACKENDS if backend in by_backend}
    cells = [
        f"{row['ms_50']:>8.4f} {row['pct_copy']:>3.0f}% {row['host_us']:>3.0f}" if (row := mine.get(backend)) else f"{'–':>17}"
        for backend in BACKENDS
    ]
    best = min(mine.values(), key=lambda row: row["ms_50"], default=None)
    return "  ".join([*cells, f"{_times(by_backend.get(TORCH), best):>5}"])


def _step_cell(by_provider: Mapping[str, Row], backend: str) -> str:
    mine, graph = by_provider.get(provider(backend)), by_provider.get(graph_of(backend))
    if mine is None:
        return f"{'–':>47}"
    replayed = "–" if graph is None else f"{graph['wall_ms']:.4f}"
    ratios = [f"{mine['loops'][name] / mine['wall_ms']:.2f}×" if name in mine["loops"] else "–" for name in LOOPS]
    return f"{mine['ms_50']:>8.4f} {mine['pct_copy']:>3.0f}% {mine['launch_us']:>5.0f} {replayed:>8} {ratios[0]:>7} {ratios[1]:>7}"


def bench_lines(found: Mapping[str, Any]) -> list[str]:
    """Operations, then steps: a line a workload and operation, a line a workload and base."""
    rows = found["rows"]
    result = [f"{found['gpu']}: {bandwidth_line(found['bandwidth'])}; gate {found['gate'].partition(':')[0]}"]
    result.append(f"operations: {' and '.join(BACKENDS)}, each: ms, of copy, host µs; torch's best takes longer by; {' | '.join(DTYPES)}")
    for (workload, op), by_dtype in op_rows(rows).items():
        if not _is_shown(workload, op):
            continue
        result.append(f"{workload:<9} {op:<15} " + " | ".join(_op_cell(by_dtype.get(dtype, {})) for dtype in DTYPES))
    heads = f"ms, of copy, µs to launch, ms of a replay, how much longer take {' and '.join(LOOPS)}"
    result.append(f"steps: {' | '.join(BACKENDS)}, each: {heads}")
    for case, by_provider in step_rows(rows).items():
        if case[0] == AMONG_BARS:
            continue
        cells = [_step_cell(by_provider, backend) for backend in BACKENDS]
        result.append(f"{case[0]:<9} {case[1]:<5} {case[2]:<4} " + " | ".join(cells))
    for (workload, base, dtype), by_provider in launch_rows(rows).items():
        if (workload, base, dtype) == ("many_tiny", "sgd", "fp32"):
            result += [f"many_tiny, SGD, {name}: {row['names'][:160]}" for name, row in by_provider.items() if name in OURS]
    return result


def _is_shown(workload: str, op: str) -> bool:
    return workload == FULL or (workload not in NOT_SHOWN and op in OF_STEPS)


def winner_lines(rows: Sequence[Row]) -> list[str]:
    """Who wins, of what the tables show and of whole steps."""
    winners = [row for row in rows if row["kind"] == "dispatch" and row["workload"] != AMONG_BARS]
    return dispatch.lines([row for row in winners if row["base"] is not None or _is_shown(row["workload"], row["op"])])


def verdict_lines(found: Mapping[str, Any]) -> list[str]:
    """Who wins, and the bars."""
    return [*winner_lines(found["rows"]), *bars.lines(found["rows"])]
