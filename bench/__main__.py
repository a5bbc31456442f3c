"""``python -m bench``: measures whole steps and single operations, prints tables and writes one JSON file."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench import allocator, gate, memory, ops, options, steps
from bench.byte_model import OPS
from bench.command import begin, write
from bench.environment import environment
from bench.providers import BASES, PROVIDERS, REFERENCE
from bench.summary import print_summary
from bench.workloads import DTYPES, WORKLOADS

SLOW_TO_START = ("torch.compile",)  # minutes, for a graph per workload, dtype and base


@options.command
@options.names("--workload", known=WORKLOADS, help="Parameter shapes.")
@options.names("--dtype", known=DTYPES, help="Types of parameters, gradients and state.")
@options.names("--base", known=BASES, help="Wrapped optimizer. SGD is measured in fp32 only.")
@options.names("--providers", known=PROVIDERS, show_default=False, help=f"Whose steps; {REFERENCE} always takes part. Default: all.")
@options.names("--skip", known=PROVIDERS, default=(), help="Providers to leave out.")
@options.names("--ops", "op_names", known=OPS, help="Single operations; '' for none.")
@options.JSON
@click.option("--name", help="Write it as bench/results/<device>/NAME.json.")
@click.option("--repeats", type=click.IntRange(min=1), help="Rounds. Default: 12 to 60, by size.")
@options.threads()
@options.ALLOCATOR
@options.MEMORY_BUDGET
@click.option("--steps/--no-steps", "with_steps", default=True, help="Whole steps.")
@click.option("--micro-batches", type=click.IntRange(min=0), default=8, show_default=True, help="Steps of m-SAM with so many; 0 for none.")
@click.option("--memory/--no-memory", "with_memory", default=True, help="Memory, in a process for each provider.")
@options.gate()
@click.option("--quick", is_flag=True, help="Three rounds, no torch.compile, no memory: does the tool work?")
def main(
    workload: list[str],
    dtype: list[str],
    base: list[str],
    providers: list[str],
    skip: list[str],
    op_names: list[str],
    json_path: Path | None,
    name: str | None,
    repeats: int | None,
    threads: int | None,
    regime: str,
    memory_budget: float,
    with_steps: bool,
    micro_batches: int,
    with_memory: bool,
    with_gate: bool,
    quick: bool,
) -> None:
    """Measures sam_kernels against its peers, all in one process and in turns."""
    allocator.ensure(regime, "bench", sys.argv[1:])
    if name is not None and not re.fullmatch(r"[\w.-]+", name):
        raise click.BadParameter("letters, digits, '_', '.' and '-' only", param_hint="--name")
    console = begin(threads)
    if quick:
        repeats = repeats or 3
        with_memory = False
        skip = [*skip, *(provider for provider in SLOW_TO_START if provider not in skip)]
    for skipped in skip:
        console.print(f"skipped {skipped}: {'--quick' if quick and skipped in SLOW_TO_START else '--skip'}", highlight=False)
    names = [provider for provider in PROVIDERS if provider == REFERENCE or (provider in providers and provider not in skip)]
    result = environment() | {"allocator": allocator.current(os.environ), "quick": quick, "gate": gate.run() if with_gate else "skipped"}
    rows = []
    budget = int(memory_budget * 2**30)
    for row in _rows(workload, dtype, base, names, op_names, repeats, budget, with_steps, micro_batches, with_memory, console):
        rows.append(row)
        result["rows"] = rows
        write(result, json_path, name)  # after every row: a run that is cut off keeps what it measured
    print_summary(result | {"rows": rows}, console)


def _rows(
    workloads: list[str],
    dtypes: list[str],
    bases: list[str],
    names: list[str],
    op_names: list[str],
    repeats: int | None,
    budget: int,
    with_steps: bool,
    micro_batches: int,
    with_memory: bool,
    console: Console,
) -> Iterator[dict[str, Any]]:
    def say(line: str) -> None:
        console.print(line, style="dim", highlight=False)

    chosen = [WORKLOADS[name] for name in workloads]
    combinations = [(base, dtype) for base, dtype in steps.COMBINATIONS if base in bases and dtype in dtypes]
    for base, dtype in itertools.product(bases, dtypes):
        if (base, dtype) not in steps.COMBINATIONS:
            say(f"skipped steps of {base} in {dtype}: 16-bit parameters are measured with AdamW")
    if with_steps:
        for workload, (base, dtype) in itertools.product(chosen, combinations):
            yield from steps.measure(workload, base, dtype, names, rounds=repeats, budget=budget, say=say)
    if micro_batches > 1:
        common: dict[str, Any] = {"rounds": repeats, "budget": budget, "say": say, "micro_batches": micro_batches}
        for workload, (base, dtype) in itertools.product(chosen, combinations):
            if (base, dtype) in steps.MICRO_BATCH_COMBINATIONS:
                yield from steps.measure(workload, base, dtype, names, **common)
    backends = ops.available_backends(say) if op_names else []
    for workload, dtype, op in itertools.product(chosen, dtypes, op_names):
        yield from ops.measure(workload, op, dtype, backends, rounds=repeats, budget=budget, say=say)
    if with_memory:
        for workload, (base, dtype) in itertools.product(chosen, combinations):
            if workload.numel > 1e6:  # below, the interpreter's own allocations drown the optimizer's
                yield from memory.measure(workload, base, dtype, names, say)


if __name__ == "__main__":
    main(prog_name="python -m bench")
