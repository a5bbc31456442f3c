"""``python -m bench.training``: whole training steps of SAM over those of the base optimizer, beside other implementations.

A step is zeroing the gradients, forward and backward passes and the optimizer; data are in memory. All implementations take turns in one
process, each on a model of its own, in an order drawn anew for every round. With one thread, times are the thread's own on a processor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import click
import psutil

from bench import allocator, memory, options
from bench.command import begin, new_result, write
from bench.providers import REFERENCE
from bench.training.measure import measure
from bench.training.models import MODELS
from bench.training.regimes import measure_map
from bench.training.runs import BASE, NAMES
from bench.training.tables import print_result
from bench.workloads import WORKLOADS

__all__ = ["QUICK_ROUNDS", "TESTS", "main", "rows"]

TESTS = ("tests/ops", "tests/bench/test_bench_training.py")
REGIMES = 2.0  # the time of the regime map, where a model has 1
QUICK_ROUNDS = 2
LARGE_GIB = 14  # that five copies of GPT-2 with AdamW's state need


@options.command
@options.names("--models", known=MODELS, help="Models to train.")
@options.names("--providers", known=NAMES, help=f"Implementations to compare; {BASE} and {REFERENCE} always take part.")
@click.option("--budget", type=click.FloatRange(min=0.1), default=10.0, show_default=True, help="Minutes for everything but the tests.")
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds of each model. Default: as many as the budget allows, 6 to 100.")
@options.threads("Threads of torch. Default: torch's.")
@click.option("--regimes/--no-regimes", "with_regimes", default=True, help="Measure the optimizer's share by tensors, elements and batch.")
@click.option("--memory/--no-memory", "with_memory", default=True, help="Measure memory, in a process for each implementation.")
@options.allocator_of_glibc("keeping")
@click.option("--quick", is_flag=True, help="Small models, two rounds, no memory, under a minute: does the tool work?")
@options.gate("Run the tests of what is measured first.")
@options.store("training")
@options.JSON
def main(
    models: Sequence[str],
    providers: Sequence[str],
    budget: float,
    rounds: int | None,
    threads: int | None,
    with_regimes: bool,
    with_memory: bool,
    regime: str,
    quick: bool,
    with_gate: bool,
    store: bool,
    json_path: Path | None,
) -> None:
    """Compare whole training steps of SAM, by sam_kernels and by others, with steps of the base optimizer."""
    if quick and store:
        raise click.UsageError("--quick measures small models: its numbers are not stored")
    allocator.ensure(regime, "bench.training", sys.argv[1:])
    console = begin(threads)
    names = [name for name in NAMES if name in (BASE, REFERENCE) or name in providers]
    result = new_result(with_gate, TESTS)
    result |= {"command": " ".join(["python -m bench.training", *sys.argv[1:]]), "quick": quick}
    if quick:
        rounds, with_memory = rounds or QUICK_ROUNDS, False

    def say(line: str) -> None:
        console.print(line, style="dim", highlight=False)

    measured = rows(
        models, names, seconds=60 * budget, rounds=rounds, with_regimes=with_regimes, with_memory=with_memory, quick=quick, say=say
    )
    for row in measured:
        result["rows"].append(row)
        write(result, json_path, "training" if store else None)  # after every row: a run that is cut off keeps what it measured
    print_result(result, console)


def rows(
    models: Sequence[str],
    names: Sequence[str],
    *,
    seconds: float,
    rounds: int | None,
    with_regimes: bool,
    with_memory: bool,
    quick: bool,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a result: memory, the models, the map of regimes.

    Args:
        models, names: of ``MODELS`` and of ``NAMES``.
        seconds, rounds: of everything, and of each model; :func:`bench.training.measure.measure` has the rules.
        quick: small models.
    """
    end = monotonic() + seconds
    if with_memory:
        yield from _memory(models, names, say)
    yield from _timed(models, names, end, rounds, with_regimes, quick, say)


def _timed(
    models: Sequence[str],
    names: Sequence[str],
    end: float,
    rounds: int | None,
    with_regimes: bool,
    quick: bool,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Rows of the models and of the map. Each has its share of the time that is left, so that what one leaves is the others'."""
    for number, name in enumerate(models):
        if (reason := _too_large(name, quick)) is not None:
            say(f"skipped {name}: {reason}")
            continue
        share = (end - monotonic()) / (len(models) - number + (REGIMES if with_regimes else 0))
        yield from measure(name, MODELS[name], names, seconds=share, rounds=rounds, say=say, quick=quick)
    if with_regimes:
        yield from measure_map(seconds=end - monotonic(), rounds=rounds, say=say, quick=quick)


def _too_large(name: str, quick: bool) -> str | None:
    free = psutil.virtual_memory().available / 2**30
    if quick or name != "gpt2_124m" or free >= LARGE_GIB:
        return None
    return f"needs {LARGE_GIB} GiB of free memory, {free:.0f} are free"


def _memory(models: Sequence[str], names: Sequence[str], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    for name in models:
        kind = MODELS[name]
        if kind.workload is not None:
            for row in memory.measure(WORKLOADS[kind.workload], kind.base, "fp32", [each for each in names if each != BASE], say):
                yield {**row, "model": name}


if __name__ == "__main__":
    main(prog_name="python -m bench.training")
