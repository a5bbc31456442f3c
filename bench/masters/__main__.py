"""``python -m bench.masters``: optimizer steps with ``master_weights=True``, of a 16-bit model on float32 masters.

Steps are norm, perturbation, check and update, without forward and backward passes; gradients are in place. With one thread, times are the
thread's own on a processor, so that other processes count less.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench import allocator, options
from bench.command import begin, new_result, write
from bench.masters import passes, rounding, steps
from bench.masters.bars import verdicts
from bench.page import count
from bench.providers import BASES
from bench.workloads import WORKLOADS

__all__ = ["main"]

TESTS = ("tests/ops/test_masters.py", "tests/ops/test_rounding.py", "tests/optim/test_master_weights.py")


@options.command
@click.option("--workload", type=click.Choice(list(WORKLOADS)), default="gpt2_124m", show_default=True, help="Shapes of the parameters.")
@options.names("--bases", known=BASES, help="Base optimizers.")
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Steps of each, and calls of each operation.")
@click.option("--passes/--no-passes", "with_passes", default=True, help="Measure each operation beside a plain pass.")
@options.threads("Threads of torch. Default: torch's.")
@options.ALLOCATOR
@options.gate("Run the tests of masters and rounding first.")
@options.store("masters")
@options.JSON
def main(
    workload: str,
    bases: Sequence[str],
    rounds: int,
    with_passes: bool,
    threads: int | None,
    regime: str,
    with_gate: bool,
    store: bool,
    json_path: Path | None,
) -> None:
    """Compare optimizer steps on float32 masters with steps in float32 and with the usual loop, in time and memory."""
    allocator.ensure(regime, "bench.masters", sys.argv[1:])
    console = begin(threads)
    result = {key: value for key, value in new_result(with_gate, TESTS).items() if key != "rows"}
    result["command"] = " ".join(["python -m bench.masters", *sys.argv[1:]])
    result |= {"rounding": rounding.measure(), "steps": [], "passes": []}
    for base in bases:
        result["steps"].append(steps.measure(WORKLOADS[workload], base, rounds=rounds))
    if with_passes:
        result["passes"] = passes.measure(WORKLOADS[workload], rounds=rounds)
    _print(result, console)
    write(result, json_path, "masters" if store else None)


def _print(result: dict[str, Any], console: Console) -> None:
    for row in result["steps"]:
        table = Table(f"{row['base']}, {count(row['threads'], 'thread')}", "ms (20/50/80 %)", "of masters", "B a parameter", "peak")
        for name, quantiles in row["ms"].items():
            memory = row["bytes_per_param"].get(name)
            shown = [] if memory is None else [f"{memory[when]:.2f}" for when in ("between", "peak")]
            table.add_row(name, " / ".join(f"{ms:.0f}" for ms in quantiles), f"{row['of_masters'][name]:.2f}", *shown)
        console.print(table)
    if result["passes"]:
        table = Table("operation", "ms (20/50/80 %)", "GB/s", "of the floor", "floor")
        for row in result["passes"]:
            pct = "" if row["pct_floor"] is None else f"{row['pct_floor']:.0f} %"
            table.add_row(row["op"], " / ".join(f"{ms:.0f}" for ms in row["ms"]), f"{row['gbps']:.1f}", pct, row["floor"] or "")
        console.print(table)
    table = Table("rounding", "cosine", "projection", "weights that move")
    for row in result["rounding"]["rows"]:
        table.add_row(row["rounding"], f"{row['cosine']:.3f}", f"{row['projection']:.3f}", f"{100 * row['moved']:.0f} %")
    console.print(table)
    for line in verdicts(result):
        console.print(line, highlight=False)


if __name__ == "__main__":
    main(prog_name="python -m bench.masters")
