"""``make gpu``: everything there is to run on a device, in one command: what is there, build, tests, sanitizer, benchmark, sweep.

No network, nothing installed, whatever torch and triton this Python has. What is missing is left out and named. The exit code is that of
the tests.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from bench.gpu import bars, gate, sanitize, sweep, sweep_products
from bench.gpu.build import build_phases
from bench.gpu.device import describe, device_name, gpu_environment
from bench.gpu.phases import Outcome, Phase, run_together, xdist_options
from bench.gpu.summary import bench_lines, winner_lines

__all__ = ["PHASES", "main"]

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("build", "tests", "sanitizer", "bench", "sweep")
# Each phase's own limit; those up to the sanitizers run side by side, as far as one does not wait for another, and share one.
SECONDS = {"triton": 210, "per_sample": 210, "native": 110, "values": 110, "device": 180, "memcheck": 80, "racecheck": 50, "initcheck": 50}
SECONDS |= {"bench": 140, "sweep": 90}
TOGETHER = 225
TOTAL = 465.0  # less than eight minutes, with what ending a phase may take
TESTS = ("triton", "per_sample", "native", "values", "device")
MARGIN = 12  # what the benchmark gets less than its process: it ends by itself and says what it left out
FAILURE_LINES = 25
Say = Callable[[str], None]


def test_phases(out: Path) -> list[Phase]:
    """Triton's values, those per sample too, need nothing built and most of their time is compiling: they begin at once, in many
    processes. All else waits for the build: values on the CUDA kernels, then bits and loss scaling on both; graphs, streams and large
    tensors in one process beside."""

    def pytest(name: str, *options: str, after: str = "build") -> Phase:
        command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={out / name}.xml", *options)
        # One thread each, or a dozen processes would each take every core.
        return Phase(name, command, SECONDS[name], {"OMP_NUM_THREADS": "1"}, after)

    values = ("tests/gpu/test_bits.py", "tests/gpu/test_amp.py")
    ignored = [f"--ignore={name}" for name in (gate.TESTS, gate.PER_SAMPLE_TESTS, *values)]
    return [
        pytest("triton", *xdist_options(), "-k", "triton or foreach", gate.TESTS, after=""),
        pytest("per_sample", *xdist_options(most=4), gate.PER_SAMPLE_TESTS, after=""),
        pytest("native", *xdist_options(most=6), "-k", "not (triton or foreach)", gate.TESTS),
        pytest("values", *xdist_options(most=6), *values, after="native"),
        pytest("device", *ignored, "tests/gpu"),
    ]


def sanitizer_phases(say: Say) -> list[Phase]:
    """One after the other: each slows the device down for all."""
    found, after = [], "build"
    for tool in sanitize.TOOLS:
        command = sanitize.command(tool)
        if command is None or device_name() is None:
            say(f"left out: {tool}: {'no device' if command else 'no compute-sanitizer'}")
            continue
        found.append(Phase(tool, command, SECONDS[tool], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, after))
        after = tool
    return found


def bench_phase(name: str, out: Path, arguments: Sequence[str]) -> Phase:
    command = (sys.executable, "-m", "bench.gpu", "--out", str(out), f"--budget={SECONDS[name] - MARGIN}", *arguments)
    return Phase(name, command, SECONDS[name])


def report(outcomes: Sequence[Outcome], say: Say) -> list[str]:
    """One line a phase; the end of what a failed one said goes out at once."""
    lines = []
    for outcome in outcomes:
        last = outcome.tail(1)[0] if outcome.output.strip() else ""
        words = last
        if outcome.phase.name in sanitize.TOOLS:
            words = sanitize.verdict(outcome.phase.name, outcome.code, outcome.output)[0]
        elif outcome.phase.name == "build" and not outcome.is_green:
            words = "the CUDA kernels are not built, native is left out"
        elif outcome.phase.name in ("bench", "sweep", "build"):
            words = ""
        lines.append(f"{outcome.phase.name:<10} {outcome.state}, {outcome.seconds:.0f} s{': ' + words.strip('= ') if words else ''}")
        if not outcome.is_green:
            for line in outcome.tail(FAILURE_LINES):
                say(f"  {outcome.phase.name} | {line[:200]}")
    return lines


def is_red(outcome: Outcome) -> bool:
    """Whether a phase says that something of ours is wrong. A test run without tests (exit code 5) is none."""
    if outcome.phase.name in sanitize.TOOLS:
        return sanitize.verdict(outcome.phase.name, outcome.code, outcome.output)[1]
    return outcome.phase.name in TESTS and outcome.code not in (0, 5)


def closing(out: Path, results: Sequence[str], lines: Sequence[str]) -> list[str]:
    """The tables of what was measured now, a line a phase, and at the very end what was asked for."""
    found: list[str] = []
    measured: list[Any] = []
    for name, table in (
        ("default", bench_lines),
        ("sweep", lambda result: [*sweep.short_lines(result["rows"]), *sweep_products.lines(result["rows"])]),
    ):
        path = out / f"{name}.json"
        if name in results and path.exists():
            result = json.loads(path.read_text())
            found += table(result)
            measured += result["rows"]
    return [*found, *winner_lines(measured), *lines, *(bars.lines(measured) if "default" in results and measured else [])]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("phases", nargs=-1, type=click.Choice(PHASES))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Default: bench/results/<device>.")
@click.option("--gate/--no-gate", "with_gate", default=True, help="Measure only what has passed its tests.")
def main(phases: tuple[str, ...], out: Path | None, with_gate: bool) -> None:
    """Runs PHASES (default: all of build, tests, sanitizer, bench and sweep) on the device of this machine."""
    chosen = phases or PHASES
    until = time.monotonic() + TOTAL
    found = gpu_environment()
    say: Say = click.echo
    for line in describe(found):
        say(line)
    out = (out or ROOT / "bench" / "results" / found["device"]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.write_text("\n".join(describe(found)) + "\n")
    lines, red = [], False

    def go(wave: Sequence[Phase], seconds: float) -> None:
        nonlocal red
        outcomes = run_together(wave, log, say, until=min(until, time.monotonic() + seconds)) if wave and time.monotonic() < until else []
        begun = {outcome.phase.name for outcome in outcomes}
        if late := [phase.name for phase in wave if phase.name not in begun]:
            say(f"left out: {', '.join(late)}: out of time")
        lines.extend(report(outcomes, say))
        red |= any(map(is_red, outcomes))

    tests = test_phases(out) if "tests" in chosen else []
    for stale in (*(out / f"{phase.name}.xml" for phase in tests), *(out / f"{name}.json" for name in _results(chosen))):
        stale.unlink(missing_ok=True)
    built = build_phases(say) if "build" in chosen else []
    go([*built, *tests, *(sanitizer_phases(say) if "sanitizer" in chosen else [])], TOGETHER)
    arguments = _gate_arguments(out, bool(tests), with_gate)
    for name, extra in (("bench", ()), ("sweep", ("--sweep",))):
        if name in chosen and device_name() is None:
            say(f"left out: {name}: no device")
        elif name in chosen:
            go([bench_phase(name, out, [*arguments, *extra])], SECONDS[name])
    if not tests:
        lines.append("tests      not asked for")
    for line in closing(out, _results(chosen), lines):
        say(line)
    say(f"{'RED' if red else 'green'}; results in {_shown(out)}")
    raise SystemExit(1 if red else 0)


def _results(chosen: Sequence[str]) -> list[str]:
    return [name for phase, name in (("bench", "default"), ("sweep", "sweep")) if phase in chosen]


def _gate_arguments(out: Path, with_tests: bool, with_gate: bool) -> list[str]:
    if not with_gate:
        return ["--no-gate"]
    return [f"--tests={out / name}.xml" for name in ("native", "triton", "per_sample")] if with_tests else []


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


if __name__ == "__main__":
    main(prog_name="python -m bench.gpu.run")
