"""The bar chart of speed-ups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.providers import PROVIDERS, REFERENCE
from bench.tables import cases, speedups, title

__all__ = ["draw", "save"]

OURS = REFERENCE.partition("/")[0]


def draw(result: dict[str, Any], path: Path) -> None:
    """One panel a case, one bar a provider: how many times longer its step takes than the reference's. Tables have our fallback too."""
    from matplotlib.figure import Figure

    found = cases([result])
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(5.2 * columns, 2.5 * lines))
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, found, strict=False):
        cells = speedups([result], case)
        names = [name for name in reversed(PROVIDERS) if name in cells and cells[name].speedup is not None]
        names = [name for name in names if name == REFERENCE or not name.startswith(f"{OURS}/")]
        values = [cells[name].speedup for name in names]
        colors = ["#1f6f8b" if name == REFERENCE else "#b0b7bf" for name in names]
        bars = axis.barh([title(name) for name in names], values, color=colors)
        axis.bar_label(bars, fmt="%.1f×", padding=3, fontsize=8)
        axis.axvline(1.0, color="#444444", linewidth=0.8)
        axis.set_title(case.title.replace(", m-SAM", ",\nm-SAM"), fontsize=10)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Time of a whole step, in units of {title(REFERENCE)}", fontsize=11)
    save(figure, path, dpi=130, top=0.99)


def save(figure: Any, path: Path, *, dpi: int, bottom: float = 0.0, top: float = 1.0) -> None:
    """Write a figure without the version of matplotlib, so that equal figures are equal files.

    Args:
        bottom, top: where a legend ends and a title begins, as shares of the height.
    """
    figure.tight_layout(rect=(0, bottom, 1, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, metadata={"Software": None})
