"""``python -m bench.family``: whole steps of the family of SAM against the same methods in Python, in turns in one process."""

from __future__ import annotations

import itertools
import sys
from functools import partial
from pathlib import Path
from time import monotonic

import click
from rich.console import Console
from rich.table import Table

from bench import allocator, gate, options, steps
from bench.command import begin, new_result, write
from bench.family.bars import verdicts
from bench.family.methods import METHODS
from bench.family.tables import CELLS, HEADINGS, cases, heading
from bench.providers import BASES, REFERENCE
from bench.workloads import WORKLOADS

__all__ = ["main"]

TESTS = (
    "tests/ops",
    *sorted(f"tests/optim/{path.name}" for path in (gate.ROOT / "tests" / "optim").glob("test_family*.py")),
    "tests/bench/test_bench_family.py",
)
PROVIDERS = tuple(dict.fromkeys(provider.name for method in METHODS.values() for provider in method.providers))


@options.command
@options.names("--methods", known=METHODS, help="Methods to measure.")
@options.names("--workloads", known=WORKLOADS, help="Parameter shapes.")
@options.names("--bases", known=BASES, help="Wrapped optimizers.")
@options.names("--providers", known=PROVIDERS, show_default=False, help=f"{REFERENCE} always takes part. Default: all.")
@click.option("--budget", type=click.FloatRange(min=0.1), default=10.0, show_default=True, help="Minutes for everything but the tests.")
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds of every row. Default: as many as the budget allows, 6 to 100.")
@options.threads()
@options.allocator_of_glibc("keeping")
@options.MEMORY_BUDGET
@options.gate("Run the tests of what is measured first.")
@options.JSON
@options.store("family")
def main(
    methods: list[str],
    workloads: list[str],
    bases: list[str],
    providers: list[str],
    budget: float,
    rounds: int | None,
    threads: int | None,
    regime: str,
    memory_budget: float,
    with_gate: bool,
    json_path: Path | None,
    store: bool,
) -> None:
    """Whole steps, forward and backward left out: gradients are given, float32."""
    allocator.ensure(regime, "bench.family", sys.argv[1:])
    console = begin(threads)
    result = new_result(with_gate, TESTS)
    console.print(f"gate {result['gate']}", highlight=False, soft_wrap=True)
    chosen = [(method, WORKLOADS[name], base) for method, name, base in itertools.product(methods, workloads, bases)]
    end = monotonic() + 60 * budget
    for number, (method, workload, base) in enumerate(chosen):
        known = METHODS[method].timed()
        for row in steps.measure(
            workload,
            base,
            "fp32",
            [name for name in known if name == REFERENCE or name in providers],
            seconds=steps.share(end, [case[1] for case in chosen[number:]]),
            rounds=rounds,
            memory=int(memory_budget * 2**30),
            say=partial(_say, console, method),
            known=known,
            passes=METHODS[method].passes(base),
            more_lists=METHODS[method].more_lists,
        ):
            result["rows"].append({**row, "kind": "family", "method": method})
            write(result, json_path, "family" if store else None)  # after every row: a run that is cut off keeps what it measured
    for case, rows in cases(result["rows"]).items():
        table = Table(*HEADINGS, title=heading(case), title_justify="left")
        for row in rows:
            table.add_row(*(cell(row) for cell in CELLS))
        console.print(table)
    for line in verdicts(result["rows"]):
        console.print(line, highlight=False)


def _say(console: Console, method: str, line: str) -> None:
    console.print(f"{method}: {line}", style="dim", highlight=False)


if __name__ == "__main__":
    main(prog_name="python -m bench.family")
