"""Results of a device as Markdown, below those of the CPU: steps for the short table, everything for the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.gpu import training
from bench.gpu.bars import tables
from bench.gpu.models import MODELS
from bench.gpu.steps import BACKENDS, LOOPS, graph_of, provider
from bench.gpu.summary import launch_rows, op_rows, step_rows
from bench.gpu.workloads import GPU_WORKLOADS
from bench.page import table
from bench.providers import BASES
from bench.tables import format_ms
from bench.workloads import DTYPES

__all__ = ["docs_section", "is_of_a_gpu", "short_section"]

Result = Mapping[str, Any]
Row = Mapping[str, Any]


def is_of_a_gpu(result: Result) -> bool:
    return "gpu" in result


def _where(result: Result) -> str:
    bandwidths = ", ".join(f"{kind} {found['gbps']:,.0f} GB/s" for kind, found in result.get("bandwidth", {}).items())
    commit = f"{result['commit']}{' with local changes' if result['dirty'] else ''}"
    versions = f"driver {result['driver']}, CUDA {result['cuda']}, torch {result['torch']}, triton {result['triton']}, commit {commit}"
    return f"{result['gpu']}, {versions}" + (f"; {bandwidths}." if bandwidths else ".")


def _case(workload: str, base: str, dtype: str) -> str:
    return f"{GPU_WORKLOADS[workload].title}, {BASES[base].title}, {dtype}"


def _ratio(row: Row, loop: str) -> str:
    return f"{row['loops'][loop] / row['wall_ms']:.1f}×" if loop in row["loops"] else "–"


def _step_rows(result: Result) -> Iterable[list[str]]:
    launched = launch_rows(result["rows"])
    for case, by_provider in step_rows(result["rows"]).items():
        for backend in BACKENDS:
            ours, graph = by_provider.get(provider(backend)), by_provider.get(graph_of(backend))
            if ours is not None:
                counted = launched.get(case, {}).get(provider(backend))
                kernels = "–" if counted is None else str(counted["kernels"])
                times = [format_ms(ours["wall_ms"]), f"{ours['pct_copy']:.0f} %", f"{ours['launch_us']:,.0f} µs"]
                replayed = "–" if graph is None else format_ms(graph["wall_ms"])
                yield [f"{_case(*case)}, {backend}", *times, replayed, *(_ratio(ours, name) for name in LOOPS), kernels]


def _steps(result: Result) -> str:
    rows = list(_step_rows(result))
    headings = [
        "whole step",
        "sam_kernels",
        "of copy",
        "to launch",
        "from a graph",
        "davda54, foreach base",
        "davda54, fused base",
        "kernels",
    ]
    return table(headings, rows) if rows else ""


def _training(result: Result) -> str:
    rows = []
    for name, by in training.by_model(result["rows"]).items():
        times = [format_ms(by[provider]["wall_ms"]) if provider in by else "–" for provider in training.PROVIDERS]
        over_base = training.ratio(by, training.SAM_STEP, training.BASE)
        over_sam = training.ratio(by, training.REWEIGHTED, training.SAM_STEP)
        rows.append([f"{MODELS[name].title}, batch {next(iter(by.values()))['batch']}", *times, over_base, over_sam])
    headings = ["whole training step", "two of the base", "SAM", "RW-SAM, exact norms", "SAM ÷ two of the base", "RW-SAM ÷ SAM"]
    return table(headings, rows) if rows else ""


def _bars(result: Result) -> str:
    rows = []
    for title, bars in tables(result["rows"]).items():
        for bar in bars:
            shown = ["–" if bar.bar is None else f"{bar.shown_bar} {bar.unit}"]
            shown.append("–" if bar.measured is None else f"{bar.measured:.2f} {bar.unit}")
            rows.append([f"{bar.figure}, {title}", *shown, bar.state])
    return table(["figure", "bar", "measured", ""], rows)


def _winners(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        if row["kind"] == "dispatch":
            what = f"`{row['op']}` {row['dtype']}" if row["base"] is None else f"step, {BASES[row['base']].title}, {row['dtype']}"
            times = [format_ms(row["ms"][backend]) for backend in BACKENDS]
            rows.append([f"{GPU_WORKLOADS[row['workload']].title}, {what}", *times, row["winner"], f"{row['factor']:.2f}×"])
    return table(["", *BACKENDS, "faster", "by"], rows) if rows else ""


def _ops(result: Result) -> Iterable[str]:
    found = op_rows(result["rows"])
    for workload in GPU_WORKLOADS:
        for dtype in DTYPES:
            rows = []
            for (name, op), by_dtype in found.items():
                for backend, row in by_dtype.get(dtype, {}).items() if name == workload else ():
                    spread = f"{format_ms(row['ms_20'])} – {format_ms(row['ms_80'])}"
                    speed = [f"{row['gbps']:,.0f}", f"{row['pct_copy']:.0f} %", f"{row['host_us']:.0f} µs"]
                    rows.append([f"`{op}` {backend}", format_ms(row["ms_50"]), spread, *speed])
            if rows:
                heading = f"### Operations: {GPU_WORKLOADS[workload].title}, {dtype}, {result['gpu']}"
                yield heading + "\n\n" + table(["", "median", "20–80 %", "GB/s", "of copy", "to launch"], rows)


def _sweep(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        if row["kind"] == "sweep":
            cut = f"{row['cut']}{', the default' if row['is_default'] else ''}"
            rows.append([f"`{row['kernel']}` {row['dtype']}, {row['backend']}", cut, format_ms(row["ms_50"]), f"{row['gbps']:,.0f}"])
    return table(["kernel", "cut", "median", "GB/s"], rows) if rows else ""


def short_section(results: Sequence[Result]) -> str:
    """Whole steps on each device."""
    parts = []
    for result in results:
        if steps := _steps(result):
            note = "On a GPU: the time of a whole step in a loop of steps, and how many times longer the published loop takes."
            parts += [note, steps, _where(result)]
    return "\n\n".join(parts)


def docs_section(results: Sequence[Result]) -> str:
    parts = []
    for result in results:
        where, steps, ops, sweep = _where(result), _steps(result), list(_ops(result)), _sweep(result)
        trained = _training(result)
        if steps or ops:
            parts += [f"## {result['gpu']}", where, f"### What was asked for, {result['gpu']}\n\n{_bars(result)}"]
            parts += [*([f"### Whole steps, {result['gpu']}\n\n{steps}"] if steps else [])]
            parts += [*([f"### Whole training steps, {result['gpu']}\n\n{trained}"] if trained else []), *ops]
            if winners := _winners(result):
                parts.append(f"### The faster backend, {result['gpu']}\n\n{winners}")
        if sweep:
            parts.append(f"### How the kernels' work is cut, {result['gpu']}, 10⁸ elements\n\n{sweep}")
    return "\n\n".join(parts)
