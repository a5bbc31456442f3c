"""``python -m bench.frameworks``: whole training steps with SAM in a framework, over steps with AdamW, beside the same in a plain loop.

Frameworks that are not installed are left out. Steps of all loops take turns in one process, each on a model of its own.
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
from bench.frameworks.bars import verdicts
from bench.frameworks.loops import FRAMEWORKS, PLAIN, PLAIN_SAM, be_quiet, missing, names_of
from bench.frameworks.measure import measure
from bench.frameworks.paced import use_one_arena
from bench.frameworks.problem import Problem

__all__ = ["main"]

TESTS = tuple(f"tests/frameworks/test_{name}.py" for name in ("transformers", "accelerate", "lightning"))


@options.command
@options.names("--frameworks", known=FRAMEWORKS, help="Packages whose integration is measured.")
@click.option("--layers", type=click.IntRange(min=1), default=4, show_default=True, help="Blocks of the GPT-2.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Sequences in a batch, of 64 tokens.")
@click.option("--rounds", type=click.IntRange(min=1), default=50, show_default=True, help="Turns of each loop.")
@click.option("--inner", type=click.IntRange(min=1), default=3, show_default=True, help="Steps of a turn that are timed.")
@options.threads("Threads of torch. Default: torch's.")
@options.allocator_of_glibc("keeping")
@options.gate("Run the tests of the integrations first.")
@options.store("frameworks")
@options.JSON
def main(
    frameworks: Sequence[str],
    layers: int,
    batch: int,
    rounds: int,
    inner: int,
    threads: int | None,
    regime: str,
    with_gate: bool,
    store: bool,
    json_path: Path | None,
) -> None:
    """Compare training steps with SAM in Trainer, accelerate and Lightning with steps with AdamW, and both with plain loops."""
    allocator.ensure(regime, "bench.frameworks", sys.argv[1:])
    use_one_arena()
    console = begin(threads)
    reasons = {name: missing(name) for name in ("transformers", *frameworks)}
    if reasons["transformers"] is not None:
        raise click.ClickException(f"transformers, whose GPT-2 all loops train: {reasons['transformers']}")
    for name in frameworks:
        if reasons[name] is not None:
            console.print(f"left out: {name}: {reasons[name]}", highlight=False)
    be_quiet()
    found = [name for name in frameworks if reasons[name] is None]
    result = new_result(with_gate, TESTS)
    result["command"] = " ".join(["python -m bench.frameworks", *sys.argv[1:]])
    result |= measure(found, problem=Problem(layers=layers, batch=batch), rounds=rounds, inner=inner)
    _print(result, console)
    write(result, json_path, "frameworks" if store else None)


def _print(result: dict[str, Any], console: Console) -> None:
    table = Table("loop", "AdamW, ms (20/50/80 %)", "SAM, ms (20/50/80 %)", "SAM over AdamW", "added", "added, host alone", "own functions")
    times = {name: " / ".join(f"{ms:.1f}" for ms in each) for name, each in result["ms"].items()}
    for name, ratios in result["plain_of_adamw"].items():
        table.add_row(name.replace(", SAM", ""), times[PLAIN] if name == PLAIN_SAM else "", times[name], f"{ratios[1]:.3f}")
    for row in result["rows"]:
        adamw, sam = names_of(row["framework"])
        host, own = (f"{row[f'{what}_us']:.0f} µs, {row[f'{what}_pct']:.2f} %" for what in ("host", "own"))
        shown = [times[adamw], times[sam], f"{row['of_adamw'][1]:.3f}", f"{row['added_pct'][1]:.2f} %", host, own]
        table.add_row(FRAMEWORKS[row["framework"]], *shown)
    console.print(table)
    for line in verdicts(result):
        console.print(line, highlight=False)


if __name__ == "__main__":
    main(prog_name="python -m bench.frameworks")
