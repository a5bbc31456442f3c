"""``python -m bench.frameworks.report FILE``: the section of docs/frameworks_cost.md from a result file. ``--check``: is it up to date?"""

from __future__ import annotations

from typing import Any

from bench.frameworks.bars import ADDED_PCT, OF_ADAMW, is_reached
from bench.frameworks.loops import FRAMEWORKS, PLAIN, PLAIN_BACKWARD, PLAIN_SAM, names_of
from bench.page import page_command, table, where

__all__ = ["section"]

PLAIN_TITLES = {PLAIN_SAM: "plain loop, `step(closure)`", PLAIN_BACKWARD: "plain loop, `backward(closure)` and `step()`"}


def section(result: dict[str, Any]) -> str:
    """Markdown: the steps, what the integrations add, and where it was measured."""
    return "\n\n".join([_steps(result), _added(result), _where(result)])


def _steps(result: dict[str, Any]) -> str:
    ms, rows = result["ms"], []
    for name, title in PLAIN_TITLES.items():
        rows.append((title, _times(ms[PLAIN]), _times(ms[name]), f"{result['plain_of_adamw'][name][1]:.2f}"))
    for row in result["rows"]:
        adamw, sam = (_times(ms[name]) for name in names_of(row["framework"]))
        ratio = row["of_adamw"][1]
        missed = "" if is_reached(ratio) else " (missed)"
        rows.append((f"{FRAMEWORKS[row['framework']]} ({row['framework']} {row['version']})", adamw, sam, f"{ratio:.2f}{missed}"))
    return table(("loop", "AdamW, ms (20 / 50 / 80 %)", "SAM, ms (20 / 50 / 80 %)", f"SAM over AdamW, {OF_ADAMW} to reach"), rows)


def _added(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        low, middle, high = row["added_pct"]
        host, own = (f"{_pct(row[f'{what}_pct'])} ({row[f'{what}_us']:.0f} µs)" for what in ("host", "own"))
        rows.append((FRAMEWORKS[row["framework"]], f"{_pct(middle)} ({low:.1f} – {high:.1f})", host, own))
    limit = f"≤ {ADDED_PCT:g} %"
    added = f"added to SAM's cost in a plain loop, {limit} (20 – 80 %)"
    return table(("of a step with SAM", added, f"the same, on the host, without passes, {limit}", f"own functions, {limit}"), rows)


def _pct(value: float) -> str:
    return f"{value:.2f} %{'' if value <= ADDED_PCT else ' (missed)'}"


def _times(ms: list[float]) -> str:
    return " / ".join(f"{each:.1f}" for each in ms)


def _where(result: dict[str, Any]) -> str:
    problem = result["problem"]
    model = f"GPT-2 of {problem['layers']} layers, {problem['width']} wide, {problem['batch']} × {problem['tokens']} tokens, float32"
    return f"{model}. `{result['command']}`. {where(result)}. Load when it began: {result['load_1min']:g}."


main = page_command(section, "frameworks_cost.md")

if __name__ == "__main__":
    main(prog_name="python -m bench.frameworks.report")
