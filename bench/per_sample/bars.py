"""The figures to reach, from the rows of one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["BARS", "Bar", "judged"]


@dataclass(frozen=True)
class Bar:
    """``of`` one provider's over that of ``over``: at most or at least ``limit``."""

    model: str
    title: str
    of: str
    over: str
    limit: float
    at_most: bool
    key: str = "ms_50"


BARS = (
    Bar("transformer", "norms: Opacus' time over ours", "opacus", "norms", 1.5, at_most=False),
    Bar("transformer", "norms: vmap's time over ours", "vmap", "norms", 2.5, at_most=False),
    Bar("transformer", "norms: our extra memory over vmap's", "norms", "vmap", 1 / 8, at_most=True, key="extra_bytes"),
    Bar("transformer", "norms beside the gradient over a plain pass", "norms+backward", "plain", 1.25, at_most=True),
    Bar("mlp", "norms beside the gradient over a plain pass", "norms+backward", "plain", 1.15, at_most=True),
    Bar("resnet18", "norms beside the gradient over a plain pass", "norms+backward", "plain", 1.4, at_most=True),
)


def judged(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[Bar, float, bool]]:
    """Each bar whose providers were measured, the ratio, and whether it is reached."""
    by_name = {(row["model"], row["provider"]): row for row in rows}
    for bar in BARS:
        values = [by_name.get((bar.model, name), {}).get(bar.key) for name in (bar.of, bar.over)]
        if values[0] is None or not values[1]:
            continue
        ratio = values[0] / values[1]
        yield bar, ratio, ratio <= bar.limit if bar.at_most else ratio >= bar.limit
