"""What a result of ``python -m bench.frameworks`` is held to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.frameworks.loops import FRAMEWORKS

__all__ = ["ADDED_PCT", "OF_ADAMW", "is_reached", "verdicts"]

OF_ADAMW = 2.0  # steps with AdamW, to one decimal: SAM makes two passes, and has a norm, a perturbation and their undoing beside them
ADDED_PCT = 1.0  # of a step with SAM


def is_reached(ratio: float) -> bool:
    """Whether a step with SAM takes no more than OF_ADAMW steps with AdamW, to one decimal."""
    return round(ratio, 1) <= OF_ADAMW


def verdicts(result: dict[str, Any]) -> Iterator[str]:
    """A line a bar: what is to be reached, what was measured, pass or FAIL."""
    for row in result["rows"]:
        title, ratio = FRAMEWORKS[row["framework"]], row["of_adamw"][1]
        yield _line(f"{title}: a step with SAM: {OF_ADAMW} steps with AdamW", f"{ratio:.3f}", is_reached(ratio))
        for what, pct in (
            ("added to SAM's cost in a plain loop", row["added_pct"][1]),
            ("the same, on the host, without passes", row["host_pct"]),
            ("in the integration's own functions", row["own_pct"]),
        ):
            yield _line(f"{title}: {what}: at most {ADDED_PCT:.0f} % of a step", f"{pct:.2f} %", pct <= ADDED_PCT)


def _line(bar: str, measured: str, passes: bool) -> str:
    return f"{bar}: {measured}: {'pass' if passes else 'FAIL'}"
