"""``make gpu``, or ``python3 -m bench.gpu.run``: what is to be run on a device, in calls of less than four minutes each.

No network, nothing installed, whatever torch and triton this Python has. What is missing is left out and named. The exit code is that of
the tests.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bench.gpu import calls, stages
from bench.gpu.closing import asked, closing, failure_lines, is_red, phase_line, tables
from bench.gpu.device import describe, device_name, gpu_environment
from bench.gpu.phases import Outcome, Phase, run_together
from bench.gpu.record import BENCH, LOG, SUMMARY, TESTS, Record, row_of, writable
from bench.gpu.results import result_of

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]
TOTAL = 218.0  # seconds: a call takes at most 240, with importing torch, and ending what does not end when it is asked to
FAILURES = 5_000  # characters of what failed phases said
STAGES = [stage.name for stage in stages.STAGES if stage.name not in stages.SWEEPS]


def _stages(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    names = [name for name in (value or "").split(",") if name]
    if unknown := [name for name in names if name not in STAGES]:
        raise click.BadParameter(f"unknown: {', '.join(unknown)}; the names are {', '.join(STAGES)}")
    return names or None


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("phases", nargs=-1, type=click.Choice(calls.PHASES))
@click.option("--call", type=click.IntRange(1, len(calls.CALLS)), default=1, show_default=True, help="Whose phases and stages.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder. Default: bench/results/<device>.")
@click.option("--seconds", default=TOTAL, show_default=True, help="After which the last phase is ended.")
@click.option("--stages", "stage_names", callback=_stages, help="Of the benchmark, separated by commas. Default: those of the call.")
@click.option("--tests", multiple=True, type=click.File(), help="tests.jsonl of an earlier call: what has passed there is measured too.")
@click.option("--gate/--no-gate", "with_gate", default=True, help="Measure only what has passed its tests.")
@click.option("--dry-run", is_flag=True, help="On the CPU, every phase on little: does the tool work?")
def main(
    phases: tuple[str, ...],
    call: int,
    out: Path | None,
    seconds: float,
    stage_names: list[str] | None,
    tests: tuple[Any, ...],
    with_gate: bool,
    dry_run: bool,
) -> None:
    """Runs PHASES (default: those of a call) on the device of this machine."""
    start = time.monotonic()
    for name, value in calls.DRY_RUN.items() if dry_run else ():
        os.environ.setdefault(name, value)
    found = gpu_environment()
    say: Callable[[str], None] = click.echo
    for line in describe(found):
        say(line)
    record = Record(writable(out or ROOT / "bench" / "results" / found["device"], say), say)
    record.start([BENCH, TESTS, LOG, SUMMARY])
    for line in describe(found):
        record.log(line)
    earlier = [row for file in tests for line in file if (row := row_of(line)) and row["kind"] == "test"]
    chosen = calls.CALLS[call]
    given = (lambda: [*earlier, *record.rows]) if with_gate else None
    plan = calls.Plan(phases or chosen.phases, stage_names or chosen.stages, start, start + seconds, given, dry_run)
    if device_name() is None and not dry_run:
        say("no CUDA device: nothing is measured (--dry-run goes through the motions on the CPU)")
    outcomes = _run(calls.phases(plan, say), record, say)
    red = _finish(record, outcomes, say)
    raise SystemExit(1 if red else 0)


def _run(phases: list[Phase], record: Record, say: Callable[[str], None]) -> list[Outcome]:
    """Whoever interrupts or terminates this process gets the tables of what there is."""
    left = FAILURES
    outcomes: list[Outcome] = []

    def ended(outcome: Outcome) -> None:
        nonlocal left
        outcomes.append(outcome)
        say(phase_line(outcome))
        for line in failure_lines(outcome):
            if len(line) < left:
                say(line)
                left -= len(line) + 1

    # Of SIGINT too: a process in the background may ignore it, and would pass that on to the phases, which are asked to end by it.
    before = {kind: signal.signal(kind, signal.default_int_handler) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        run_together(phases, record, ended)
    except KeyboardInterrupt:
        absent = [phase.name for phase in phases if phase not in [outcome.phase for outcome in outcomes]]
        say(f"interrupted: {', '.join(absent)} did not end")
        outcomes += [Outcome(phase, None, 0.0) for phase in phases if phase.name in absent]
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    return sorted(outcomes, key=lambda outcome: phases.index(outcome.phase))


def _finish(record: Record, outcomes: list[Outcome], say: Callable[[str], None]) -> bool:
    """The tables and the verdict: in full to a file, as far as there is room to the output."""
    lines = [phase_line(outcome) for outcome in outcomes]
    result = result_of(record.rows)
    red = [outcome.phase.name for outcome in outcomes if is_red(outcome)]
    late = [outcome.phase.name for outcome in outcomes if outcome.code is None]
    failed = [outcome.phase.name for outcome in outcomes if outcome.code not in (None, 0, 5) and not is_red(outcome)]
    verdict = f"RED: {', '.join(red)}" if red else "green"
    verdict += f"; failed: {', '.join(failed)}" if failed else ""
    verdict += f"; cut off or left out: {', '.join(late)}" if late else ""
    verdict += f"; results in {_shown(record.folder)}" if record.folder is not None else "; no results were kept"
    for line in [*(line for block in tables(result) for line in block), *lines, *asked(result), verdict]:
        record.line(SUMMARY, line)
    for line in [*closing(result, lines), verdict]:
        say(line)
    return bool(red)


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    main(prog_name="python -m bench.gpu.run")
