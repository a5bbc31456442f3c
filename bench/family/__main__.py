"""``python -m bench.family``: whole steps of the family of SAM against the same methods in Python, in turns in one process."""

from __future__ import annotations

import itertools
import os
import sys
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from bench import allocator, gate, steps
from bench.__main__ import Names
from bench.command import begin, write
from bench.environment import environment
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


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--method", "methods", type=Names(list(METHODS)), default=",".join(METHODS), show_default=True, help="Whose steps.")
@click.option("--workload", "workloads", type=Names(list(WORKLOADS)), default=",".join(WORKLOADS), show_default=True, help="Shapes.")
@click.option("--base", "bases", type=Names(list(BASES)), default=",".join(BASES), show_default=True, help="Wrapped optimizer.")
@click.option("--providers", type=Names(list(PROVIDERS)), default=",".join(PROVIDERS), help=f"{REFERENCE} always takes part. Default: all.")
@click.option("--repeats", type=click.IntRange(min=1), help="Rounds. Default: 12 to 60, by size.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: torch's.")
@click.option("--allocator", "regime", type=click.Choice(list(allocator.REGIMES)), default="default", help="glibc's, by a new process.")
@click.option("--memory-budget", type=click.FloatRange(min=1), default=14.0, show_default=True, help="GiB; providers are split to fit.")
@click.option("--gate/--no-gate", "with_gate", default=True, help="Run the tests of what is measured first.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the result file.")
@click.option("--store", is_flag=True, help="Write it as bench/results/<device>/family.json.")
def main(
    methods: list[str],
    workloads: list[str],
    bases: list[str],
    providers: list[str],
    repeats: int | None,
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
    result = environment() | {
        "allocator": allocator.current(os.environ),
        "gate": gate.run(tests=TESTS) if with_gate else "skipped",
        "rows": [],
    }
    console.print(f"gate {result['gate']}", highlight=False, soft_wrap=True)
    for method, workload, base in itertools.product(methods, workloads, bases):
        known = METHODS[method].timed()
        for row in steps.measure(
            WORKLOADS[workload],
            base,
            "fp32",
            [name for name in known if name == REFERENCE or name in providers],
            rounds=repeats,
            budget=int(memory_budget * 2**30),
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
