"""Three figures for the README from stored results: a training step, an optimizer step, memory. Each line has its conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
Result = dict[str, Any]


def lines(training: Result, steps: Result | None) -> list[str]:
    """Return Markdown, a line for each figure that was measured.

    Args:
        training: a result of ``python -m bench.training``.
        steps: a result of ``python -m bench``, for the optimizer step without passes; None: no such line.
    """
    found = [_training_step(training), None if steps is None else _optimizer_step(steps), _memory(training)]
    return [line for line in found if line is not None]


def _machine(result: Result) -> str:
    return f"{result['cpu']}, {count(result['threads'], 'thread')}"


def _training_step(result: Result) -> str | None:
    shown = by_model(result["rows"])
    parts = []
    for model in SHOWN:
        rows = shown.get(model, {})
        if REFERENCE in rows and LOOP in rows:
            ours, loop = rows[REFERENCE], rows[LOOP]
            share = f"optimizer {100 * ours['share_50']:.1f} % of it"
            parts.append(f"{ours['over_base_50']:.2f} × ({MODELS[model].title}; usual loop {loop['over_base_50']:.2f} ×; {share})")
    if not parts:
        return None
    return f"* **Whole training step**, over a step of the fused base optimizer: {', '.join(parts)}. {_machine(result)}, float32."


def _optimizer_step(result: Result) -> str | None:
    for case in cases([result]):
        if (case.workload, case.dtype, case.base, case.micro_batches) != (*STEP, 1):
            continue
        others = {name: cell for name, cell in speedups([result], case).items() if not name.startswith("sam_kernels")}
        ours = speedups([result], case).get(REFERENCE)
        if ours is None or LOOP not in others:
            return None
        fastest = min(others, key=lambda name: others[name].ms)
        ratios = [f"the usual loop with a fused base takes {_over(others[LOOP].speedup)} as long"]
        if fastest != LOOP:
            ratios.append(f"the fastest alternative ({title(fastest)}) {_over(others[fastest].speedup)}")
        return f"* **Optimizer step** (passes left out), {case.title}: {format_ms(ours.ms)}; {', '.join(ratios)}. {_machine(result)}."
    return None


def _over(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1f} ×"


def _memory(result: Result) -> str | None:
    rows: Sequence[dict[str, Any]] = result["rows"]
    for model in reversed(SHOWN):
        ours, loop = (memory_of(rows, model, name) for name in (REFERENCE, LOOP))
        if ours is not None and loop is not None:
            beyond = "at the peak of an optimizer step, beyond weights, gradients and the base's state"
            return f"* **Memory** {beyond}: {ours:.2f} × the weights; usual loop {loop:.2f} × ({MODELS[model].title.partition(',')[0]})."
    return None
