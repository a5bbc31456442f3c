"""The README's figures from stored results: gain, training step, optimizer step, memory. Each line has its conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.dial.methods import SAM
from bench.dial.results import PROTOCOLS, Results
from bench.dial.tasks import TASKS
from bench.page import count
from bench.providers import REFERENCE
from bench.tables import cases, format_ms, speedups
from bench.training.models import MODELS
from bench.training.runs import LOOP, title
from bench.training.tables import by_model, memory_of

__all__ = ["BEGIN", "END", "SHOWN", "lines"]

BEGIN, END = "<!-- numbers:begin -->", "<!-- numbers:end -->"
SHOWN = ("resnet18", "gpt2_124m")  # one where the passes decide, one where the optimizer does
STEP = ("gpt2_124m", "fp32", "sgd")
GAINS = ("noisy-labels", "clean-labels")  # a task where SAM gains, and one where it does not
EXPLAINED = "docs/training_cost.md#how-to-read-the-tables"
UNMEASURED = "GPU: not yet measured"  # until bench/results has a device: tests/test_first_screen.py
Result = dict[str, Any]


def lines(training: Result, steps: Result | None, dial: Result | None = None) -> list[str]:
    """Return Markdown, a line for each figure that was measured.

    Args:
        training: a result of ``python -m bench.training``.
        steps: a result of ``python -m bench``, for the optimizer step without passes; None: no such line.
        dial: a result of ``python -m bench.dial``, for the gain in accuracy; None: no such line.
    """
    found = [
        None if dial is None else _gain(dial),
        _training_step(training),
        None if steps is None else _optimizer_step(steps),
        _memory(training),
    ]
    return [line for line in found if line is not None]


def _machine(result: Result) -> str:
    return f"CPU: {result['cpu']}, {count(result['threads'], 'thread')}. {UNMEASURED}."


def _gain(result: Result) -> str | None:
    found = Results(result)
    if not set(GAINS) <= set(found.tasks):
        return None
    parts = []
    for name in GAINS:
        gains = " / ".join(found.gain(name, SAM, protocol).text(1) for protocol in PROTOCOLS)
        parts.append(f"{gains.replace('-', '−')} points with {TASKS[name].title}")
    seeds = len(found.row(GAINS[0], SAM)["scores"]["equal_epochs"])
    data = f"{TASKS[GAINS[0]].samples} MNIST images, {count(seeds, 'seed')}"
    return f"* **Gain** in test accuracy over SGD, at {' / '.join(PROTOCOLS.values())}: {', '.join(parts)} ({data})."


def _training_step(result: Result) -> str | None:
    shown = by_model(result["rows"])
    parts = []
    for model in SHOWN:
        rows = shown.get(model, {})
        if REFERENCE in rows and LOOP in rows:
            ours, loop = rows[REFERENCE], rows[LOOP]
            name = "usual loop" if parts else f"[usual loop]({EXPLAINED})"
            parts.append(f"{ours['over_base_50']:.2f} × ({MODELS[model].title}; {name} {loop['over_base_50']:.2f} ×)")
    if not parts:
        return None
    return f"* **Training step** over the base optimizer's: {', '.join(parts)}. Float32, {_machine(result)}"


def _optimizer_step(result: Result) -> str | None:
    for case in cases([result]):
        if (case.workload, case.dtype, case.base, case.micro_batches) != (*STEP, 1):
            continue
        others = {name: cell for name, cell in speedups([result], case).items() if not name.startswith("sam_kernels")}
        ours = speedups([result], case).get(REFERENCE)
        if ours is None or LOOP not in others:
            return None
        fastest = min(others, key=lambda name: others[name].ms)
        ratios = [f"usual loop {_over(others[LOOP].speedup)}"]
        if fastest != LOOP:
            ratios.append(f"fastest alternative ({title(fastest)}) {_over(others[fastest].speedup)}")
        found = f"{format_ms(ours.ms)}; {', '.join(ratios)} as long"
        return f"* **Optimizer step** without forward and backward: {found}. {case.title}, {_machine(result)}"
    return None


def _over(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1f} ×"


def _memory(result: Result) -> str | None:
    rows: Sequence[dict[str, Any]] = result["rows"]
    for model in reversed(SHOWN):
        ours, loop = (memory_of(rows, model, name) for name in (REFERENCE, LOOP))
        if ours is not None and loop is not None:
            others = f"{MODELS[model].title.partition(',')[0]}; usual loop {loop:.2f} ×"
            return f"* **Memory** beyond the base optimizer's, at its peak: {ours:.2f} × the weights ({others})."
    return None
