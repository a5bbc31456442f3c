"""Rows as the cells of tables, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.providers import REFERENCE
from bench.training.models import MODELS
from bench.training.runs import BASE, LOOP, title

__all__ = ["HEADINGS", "REGIME_HEADINGS", "by_model", "cells", "memory_of", "print_result", "regime_cells"]

Row = dict[str, Any]
HEADINGS = ("training step with", "ms (20 – 80 %)", "× base (20 – 80 %)", "optimizer, ms", "optimizer's share", "memory, × weights")
REGIME_HEADINGS = ("tensors", "elements")
_DASH = "–"


def by_model(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """{model: {implementation: row}} of the training steps, in the order of measuring."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == "training":
            found.setdefault(row["model"], {})[row["provider"]] = row
    return found


def memory_of(rows: Sequence[Row], model: str, provider: str) -> float | None:
    """Return the bytes at the peak of an optimizer step beyond weights, gradients and the base's state, over those of the weights."""
    for row in rows:
        if row["kind"] == "memory" and (row["model"], row["backend"]) == (model, provider) and row["peak_bytes"] is not None:
            return float(row["peak_bytes"]) / (4 * row["numel"])
    return None


def cells(rows: Sequence[Row], model: str) -> list[list[str]]:
    """A line for each implementation, the base first, then by the time of a step."""
    of_model = by_model(rows)[model]
    lines = []
    for name, row in sorted(of_model.items(), key=lambda item: (item[0] != BASE, item[1]["over_base_50"])):
        memory = 0.0 if name == BASE else memory_of(rows, model, name)
        has_memory = any(each["kind"] == "memory" and each["model"] == model for each in rows)
        lines.append(
            [
                title(name, row["base"]),
                f"{_ms(row['ms_50'])} ({_ms(row['ms_20'])} – {_ms(row['ms_80'])})",
                f"{row['over_base_50']:.2f} ({row['over_base_20']:.2f} – {row['over_base_80']:.2f})",
                _ms(row["optimizer_ms_50"]),
                f"{100 * row['share_50']:.1f} %",
                _DASH if memory is None or not has_memory else f"{memory:.2f}",
            ]
        )
    return lines


def _ms(value: float) -> str:
    """Three digits, or whole milliseconds."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def regime_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the map: the usual loop's share of a step, and what sam_kernels takes off the step."""
    found: dict[tuple[int, int], dict[int, dict[str, Row]]] = {}
    for row in rows:
        if row["kind"] == "regime":
            found.setdefault((row["tensors"], row["elements"]), {}).setdefault(row["batch"], {})[row["provider"]] = row
    batches = sorted({batch for by_batch in found.values() for batch in by_batch})
    lines = [
        [f"{tensors:,}", f"{elements:,}", *(_regime_cell(by_batch.get(batch, {})) for batch in batches)]
        for (tensors, elements), by_batch in sorted(found.items())
    ]
    return [*REGIME_HEADINGS, *(f"batch {batch}" for batch in batches)], lines


def _regime_cell(of: dict[str, Row]) -> str:
    if LOOP not in of or REFERENCE not in of:
        return _DASH
    saved = 100 * (1 - of[REFERENCE]["over_loop_50"])
    return f"{100 * of[LOOP]['share_50']:.0f} % → {100 * of[REFERENCE]['share_50']:.0f} %, saves {saved:.0f} %".replace("-", "−")


def print_result(result: Row, console: Console) -> None:
    """The tables on the terminal."""
    for model in by_model(result["rows"]):
        table = Table(*HEADINGS, title=f"{MODELS[model].title.replace('`', '')} (allocator: {result['allocator']})", title_justify="left")
        for line in cells(result["rows"], model):
            table.add_row(*line)
        console.print(table)
    headings, lines = regime_cells(result["rows"])
    if lines:
        table = Table(*headings, title="the optimizer's share of a step: usual loop → sam_kernels, time saved", title_justify="left")
        for line in lines:
            table.add_row(*line)
        console.print(table)
