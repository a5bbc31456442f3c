"""The chart: a training step of each implementation over one of the base, split into passes and optimizer."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from bench.chart import save
from bench.providers import REFERENCE
from bench.training.models import MODELS
from bench.training.runs import BASE, NAMES, title
from bench.training.tables import by_model

__all__ = ["draw"]

COLUMNS = 2
# Passes and optimizer: each pair differs in lightness, and so do ours and the others', so that the chart can be read in grey.
OURS, OTHERS, OF_BASE = ("#6fb3cc", "#0b4f6c"), ("#d3d7db", "#7b838c"), ("#f0e2c0", "#a9852f")


def draw(result: dict[str, Any], path: Path, models: Collection[str] = tuple(MODELS)) -> None:
    """Write the chart: a panel for each of ``models``, a bar for each implementation, one scale for all panels.

    Background and text are opaque, so that the chart can be read on a dark page too. Error bars: 20 to 80 % of the rounds' ratios.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    found = {model: rows for model, rows in by_model(result["rows"]).items() if model in models}
    lines = -(-len(found) // COLUMNS)
    longest = max(row["over_base_80"] for of_model in found.values() for row in of_model.values())
    figure = Figure(figsize=(5.0 * COLUMNS, 0.9 + 1.55 * lines), facecolor="white")
    axes = figure.subplots(lines, COLUMNS, squeeze=False, sharex=True)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for number, (axis, (model, rows)) in enumerate(zip(axes.flat, found.items(), strict=False)):
        _panel(axis, rows, [name for name in reversed(NAMES) if name in rows])
        axis.set_title(MODELS[model].title.replace("`", ""), fontsize=9, loc="left")
        axis.set_xlim(0, 1.12 * longest)
        if number + COLUMNS >= len(found):  # nothing below it
            axis.set_xlabel("time of a training step, × the base's (shorter is faster)", fontsize=9)
            axis.tick_params(labelbottom=True)
    shades = zip(("base optimizer alone", "sam_kernels", "others"), (OF_BASE, OURS, OTHERS), strict=True)
    patches = [
        Patch(facecolor=color, label=f"{who}: {part}")
        for who, pair in shades
        for color, part in zip(pair, ("passes", "optimizer"), strict=True)
    ]
    figure.legend(handles=patches, loc="lower center", ncols=3, fontsize=9, frameon=False)
    save(figure, path, dpi=130, bottom=0.6 / (0.9 + 1.55 * lines))


def _panel(axis: Any, rows: dict[str, Any], names: list[str]) -> None:
    for place, name in enumerate(names):
        row = rows[name]
        over = row["over_base_50"]
        passes, optimizer = OF_BASE if name == BASE else OURS if name == REFERENCE else OTHERS
        axis.barh(place, over * (1 - row["share_50"]), color=passes)
        axis.barh(place, over * row["share_50"], left=over * (1 - row["share_50"]), color=optimizer)
        if name != BASE:
            spread = [[over - row["over_base_20"]], [row["over_base_80"] - over]]
            axis.errorbar(over, place, xerr=spread, color="black", linewidth=1, capsize=2)
        axis.annotate(f"{over:.2f}×", (row["over_base_80"], place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_yticks(range(len(names)), [_short(name) for name in names])
    axis.tick_params(labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def _short(name: str) -> str:
    """Without the base, which is the fused one everywhere."""
    return "base optimizer" if name == BASE else title(name).partition(",")[0]
