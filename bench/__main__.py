"""``python -m bench``: whole training steps, optimizer steps, single operations and memory, in that order.

``python -m bench compare OLD.json NEW.json`` compares two results, ``python -m bench --base REV`` two revisions.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bench import against, allocator, compare, options, parts
from bench.byte_model import CALLS
from bench.command import begin, new_result, write
from bench.providers import BASES, FASTEST, PROVIDERS, REFERENCE
from bench.summary import print_summary
from bench.training.tables import print_result
from bench.workloads import DTYPES, WORKLOADS

__all__ = ["main"]

_MINUTES = ", ".join(f"{minutes:g} for {part}" for part, minutes in parts.MINUTES.items())
REGIME = "keeping"  # no step hands memory back to the system: whether one does depends on what the process allocated before


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@options.names("--parts", "chosen", known=parts.PARTS, help="Parts to measure, separated by commas.")
@options.names("--workloads", known=WORKLOADS, help="Parameter shapes of optimizer steps, operations and memory.")
@options.names("--dtypes", known=DTYPES, help="Types of parameters, gradients and state. SGD is measured in fp32 only.")
@options.names("--bases", known=BASES, help="Wrapped optimizers.")
@options.names("--providers", known=PROVIDERS, default=FASTEST, help=f"Implementations of optimizer steps; {REFERENCE} always takes part.")
@options.names("--operations", known=CALLS, show_default=False, help="Operations, with commas between them. Default: all.")
@click.option("--micro-batches", type=click.IntRange(min=0), default=4, show_default=True, help="Micro-batches of m-SAM; 0: no m-SAM.")
@click.option("--budget", type=click.FloatRange(min=0.1), help=f"Minutes of all timed parts. Default: {_MINUTES}.")
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds of every row. Default: as many as the budget allows, 6 to 100.")
@options.threads("Threads of torch. Default: torch's.")
@options.allocator_of_glibc(REGIME)
@options.MEMORY_BUDGET
@click.option("--quick", is_flag=True, help="Three rounds, small models, no memory: does the tool work?")
@click.option("--base", "revision", metavar="REV", help="Compare optimizer steps with those of a git revision, and measure nothing else.")
@options.gate("Run the tests of what is measured first.")
@options.store("optimizer", f" and training.json. With another allocator than {REGIME} its name is appended")
@options.JSON
@click.pass_context
def main(
    ctx: click.Context,
    chosen: Sequence[str],
    workloads: Sequence[str],
    dtypes: Sequence[str],
    bases: Sequence[str],
    providers: Sequence[str],
    operations: Sequence[str],
    micro_batches: int,
    budget: float | None,
    rounds: int | None,
    threads: int | None,
    regime: str,
    memory_budget: float,
    quick: bool,
    revision: str | None,
    with_gate: bool,
    store: bool,
    json_path: Path | None,
) -> None:
    """Measure sam_kernels beside its peers: training steps, optimizer steps, operations and memory. All take turns in one process."""
    if ctx.invoked_subcommand is not None:
        return
    common: dict[str, Any] = {"workloads": workloads, "bases": bases, "threads": threads, "with_gate": with_gate, "json_path": json_path}
    if revision is not None:
        ctx.invoke(against.main, commit=revision, dtypes=dtypes, store=store, **common)
        return
    if store and (quick or any(not parts.is_whole(name, chosen) for name in parts.FILES)):
        raise click.UsageError("--store writes whole files: without --quick, and steps, operations and memory together")
    allocator.ensure(regime, "bench", sys.argv[1:])
    console = begin(threads)

    def say(line: str) -> None:
        console.print(line, style="dim", highlight=False)

    result = new_result(with_gate, parts.TESTS) | {"command": " ".join(["python -m bench", *sys.argv[1:]]), "quick": quick}
    names = [name for name in PROVIDERS if name == REFERENCE or name in providers]
    choice = parts.Choice(workloads, dtypes, bases, names, operations, micro_batches, rounds, int(memory_budget * 2**30), quick)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in parts.FILES}
    seconds = parts.seconds_of(chosen, budget)
    suffix = "" if regime == REGIME else f"_{regime}"
    for part in (part for part in parts.PARTS if part in chosen):
        name = parts.file_of(part)
        for row in parts.measure(part, choice, seconds[part], say):
            rows[name].append(row)  # and written: a run that is cut off keeps what it measured
            write(result | {"rows": rows[name]}, None, f"{name}{suffix}" if store else None)
            write(result | {"rows": list(itertools.chain(*rows.values()))}, json_path, None)
    print_result(result | {"rows": rows["training"]}, console)
    print_summary(result | {"rows": rows["optimizer"]}, console)


main.add_command(compare.main, "compare")

if __name__ == "__main__":
    main(prog_name="python -m bench")
