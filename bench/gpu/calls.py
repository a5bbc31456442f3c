"""What ``make gpu`` runs: the phases there are, and three calls of them that together are everything."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.gpu import carry, gate, sanitize, stages
from bench.gpu.device import device_name
from bench.gpu.phases import Phase, xdist_options

__all__ = ["CALLS", "DRY_RUN", "PHASES", "SECONDS", "TESTS", "Call", "Plan", "phases"]

PHASES = ("build", "smoke", "values", "behaviour", "sanitizer", "bench", "sweep")
SECONDS = {"build": 110.0, "smoke": 60.0}  # each one's own limit
TESTS = ("smoke", "triton", "native", "per_sample", "bits", "device")  # phases with rows of tests
TESTS_SHARE = 0.55  # of the time, if something is measured after the tests
MARGIN = 4.0  # seconds that the benchmark ends before its process is ended
# What a run without a device stands on.
DRY_RUN = {"SAM_KERNELS_TEST_DEVICE": "cpu", "TRITON_INTERPRET": "1", "SAM_KERNELS_CUDA_ON_HOST": "1"}
DRY_SECONDS = 30.0  # of a phase of tests: interpreted kernels take their time
Say = Callable[[str], None]


@dataclass(frozen=True)
class Call:
    """``stages``: of the benchmark."""

    phases: tuple[str, ...]
    stages: tuple[str, ...]


ALL = tuple(stage.name for stage in stages.STAGES if stage.name not in stages.SWEEPS)
FIRST = ("bars", "one_1e8", "resnet18", "resnet50", "training")
CALLS = {
    1: Call(("build", "smoke", "values", "bench"), ALL),
    2: Call(("build", "smoke", "behaviour", "bench"), tuple(name for name in ALL if name not in FIRST)),
    3: Call(("build", "smoke", "sanitizer", "sweep"), ()),
}


@dataclass(frozen=True)
class Plan:
    """``start``, ``end``: by time.monotonic(). ``tests``: makes the rows of the tests when the benchmark begins; None: no gate."""

    chosen: Sequence[str]
    stages: Sequence[str]
    start: float
    end: float
    tests: Callable[[], Sequence[Mapping[str, Any]]] | None
    is_dry_run: bool = False

    @property
    def tests_end(self) -> float:
        measures = "bench" in self.chosen or "sweep" in self.chosen
        return self.start + TESTS_SHARE * (self.end - self.start) if measures else self.end


def phases(plan: Plan, say: Say) -> list[Phase]:
    """In the order of ``PHASES``. What cannot be run here is left out, with a line that says why."""
    if plan.is_dry_run and "build" in plan.chosen:
        say("left out: build: a dry run takes the modules that are there")
    # A machine that the modules were just carried to has no others.
    built = [_build()] if ("build" in plan.chosen or carry.is_there()) and not plan.is_dry_run else []
    smoke = [_smoke(plan)] if "smoke" in plan.chosen else []
    tested = _tests(plan, say)
    return [*built, *smoke, *tested, *_measurements(plan, [phase.name for phase in (*built, *smoke, *tested)], say)]


def _build() -> Phase:
    return Phase("build", (sys.executable, "-m", "bench.gpu.build"), SECONDS["build"])


def _smoke(plan: Plan) -> Phase:
    command = (sys.executable, "-m", "bench.gpu.smoke", *(["--dry-run"] if plan.is_dry_run else []))
    return Phase("smoke", command, SECONDS["smoke"], after=("build",))


def _tests(plan: Plan, say: Say) -> list[Phase]:
    found = []
    if "values" in plan.chosen or "behaviour" in plan.chosen:
        if importlib.util.find_spec("pytest") is None:
            say("left out: values, behaviour: no pytest (pip install pytest pytest-xdist)")
        else:
            found += [*(_values(plan) if "values" in plan.chosen else []), *(_behaviour(plan) if "behaviour" in plan.chosen else [])]
    return [*found, *(_sanitizers(plan, [phase.name for phase in found], say) if "sanitizer" in plan.chosen else [])]


def _pytest(plan: Plan, name: str, *options: str) -> Phase:
    # One thread each, or a dozen processes would each take every core.
    env, seconds = {"OMP_NUM_THREADS": "1"}, DRY_SECONDS if plan.is_dry_run else math.inf
    return Phase(name, (sys.executable, "-m", "pytest", *gate.PLUGIN, *options), seconds, env, ("build", "smoke"), plan.tests_end)


def _values(plan: Plan) -> list[Phase]:
    """Most of the time of Triton's is compiling: they have more processes."""
    only = " and restore_" if plan.is_dry_run else ""
    return [
        _pytest(plan, "triton", *xdist_options(), "-k", f"(triton or foreach){only}", gate.TESTS),
        _pytest(plan, "native", *xdist_options(most=6), "-k", f"not (triton or foreach){only}", gate.TESTS),
    ]


def _behaviour(plan: Plan) -> list[Phase]:
    """Norms per sample, bits and loss scaling; graphs, streams and large tensors in one process beside them."""
    values = ("tests/gpu/test_bits.py", "tests/gpu/test_amp.py")
    ignored = [f"--ignore={name}" for name in (gate.TESTS, gate.PER_SAMPLE_TESTS, *values)]
    return [
        _pytest(plan, "device", *ignored, "tests/gpu"),
        _pytest(plan, "bits", *xdist_options(most=6), *values),
        _pytest(plan, "per_sample", *xdist_options(most=6), gate.PER_SAMPLE_TESTS),
    ]


def _sanitizers(plan: Plan, after: Sequence[str], say: Say) -> list[Phase]:
    """Side by side: most of their time is the host's, which compiles Triton's kernels and launches small ones."""
    found = []
    for tool in sanitize.TOOLS:
        command = sanitize.command(tool)
        if command is None or device_name() is None:
            say(f"left out: {tool}: {'no device' if command else 'no compute-sanitizer on PATH; it comes with the CUDA toolkit'}")
            continue
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found.append(Phase(tool, command, math.inf, env, ("build", "smoke", *after), plan.tests_end))
    return found


def _measurements(plan: Plan, after: Sequence[str], say: Say) -> list[Phase]:
    found: list[Phase] = []
    for name, stage_names in (("bench", plan.stages), ("sweep", stages.SWEEPS)):
        if name not in plan.chosen:
            continue
        if device_name() is None and not plan.is_dry_run:
            say(f"left out: {name}: no CUDA device")
            continue
        end = plan.end if name == "sweep" or "sweep" not in plan.chosen else (plan.end + plan.tests_end) / 2
        command = [sys.executable, "-m", "bench.gpu", "--out=-", f"--until={time.time() + end - time.monotonic() - MARGIN:.0f}"]
        command += [f"--stages={','.join(stage_names)}", "--no-gate" if plan.tests is None else "--tests=-"]
        command += ["--dry-run"] if plan.is_dry_run else []
        # Interpreted kernels would take minutes; the benchmark lets another backend stand in.
        env = {"TRITON_INTERPRET": "0"} if plan.is_dry_run and name == "bench" else {}
        found.append(Phase(name, tuple(command), math.inf, env, (*after, *(phase.name for phase in found)), end, _given(plan.tests)))
    return found


def _given(tests: Callable[[], Sequence[Mapping[str, Any]]] | None) -> Callable[[], str] | None:
    if tests is None:
        return None
    return lambda: "".join(f"{json.dumps(row)}{os.linesep}" for row in gate.condensed(tests()))
