"""The figures to reach, from the rows of one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["BARS", "Bar", "as_table", "judged", "verdicts"]


@dataclass(frozen=True)
class Bar:
    """``of`` one provider's, over that of ``over`` where there is one: at most or at least ``limit``."""

    model: str
    title: str
    of: str
    over: str | None
    limit: float
    at_most: bool
    key: str = "ms_50"

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.limit:.3g}"


BARS = (
    Bar("transformer", "norms: Opacus' time over ours", "opacus", "norms", 1.5, at_most=False),
    Bar("transformer", "norms: vmap's time over ours", "vmap", "norms", 2.5, at_most=False),
    Bar("transformer", "norms: our extra memory over vmap's", "norms", "vmap", 1 / 8, at_most=True, key="extra_bytes"),
    Bar("transformer", "norms beside the gradient over a plain pass", "norms+backward", "plain", 1.25, at_most=True),
    Bar("mlp", "norms beside the gradient over a plain pass", "norms+backward", "plain", 1.15, at_most=True),
    Bar("resnet18", "norms beside the gradient over a plain pass", "norms+backward", "plain", 1.4, at_most=True),
)


def judged(rows: Sequence[dict[str, Any]], bars: Sequence[Bar] = BARS) -> Iterator[tuple[Bar, float, bool]]:
    """Each bar whose providers were measured, the figure, and whether it is reached."""
    by_name = {(row["model"], row["provider"]): row for row in rows}
    for bar in bars:
        value = by_name.get((bar.model, bar.of), {}).get(bar.key)
        over = 1.0 if bar.over is None else by_name.get((bar.model, bar.over), {}).get(bar.key)
        if value is None or not over:
            continue
        figure = value / over
        yield bar, figure, figure <= bar.limit if bar.at_most else figure >= bar.limit


def verdicts(rows: Sequence[dict[str, Any]], bars: Sequence[Bar] = BARS) -> Iterator[str]:
    """A line a bar, for the terminal."""
    for bar, figure, reached in judged(rows, bars):
        yield f"{'pass' if reached else 'FAIL'}  {bar.model}: {bar.title}: {figure:.3f} ({bar})"


def as_table(rows: Sequence[dict[str, Any]], bars: Sequence[Bar] = BARS) -> Iterator[str]:
    """The lines of a table in Markdown."""
    yield from ("| figure | to reach | measured |", "|---|---:|---:|")
    for bar, figure, reached in judged(rows, bars):
        yield f"| {bar.model}: {bar.title} | {bar} | {figure:.4g}{'' if reached else ' (missed)'} |"
