"""What a result of ``python -m bench.masters`` is held to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.masters.memory import MIXED_PRECISION
from bench.masters.passes import STOCHASTIC
from bench.masters.steps import FLOAT32, MASTERS
from bench.page import count

__all__ = ["OF_FLOAT32", "OF_LOOP", "PCT_FLOOR", "verdicts"]

OF_FLOAT32, OF_LOOP = 1.25, 3.0  # times as fast
MORE_BYTES = 0.0  # a parameter, beyond mixed-precision training with the base alone
PCT_FLOOR = 85.0
EXACT = 0.005  # bytes a parameter: what two decimals show as zero


def verdicts(result: dict[str, Any]) -> Iterator[str]:
    """A line a bar: what is to be reached, what was measured, pass or FAIL."""
    for row in result["steps"]:
        base, threads = row["base"], row["threads"]
        for what, name, least in (("SAM in float32", FLOAT32, OF_FLOAT32), ("the usual loop", row["fastest_loop"], OF_LOOP)):
            ratio = row["of_masters"][name]
            yield _line(f"{base}, {count(threads, 'thread')}: at least {least} times as fast as {what}", f"{ratio:.2f}", ratio >= least)
        for when in ("between", "peak"):
            more = row["bytes_per_param"][MASTERS][when] - MIXED_PRECISION[base]
            where = "between steps" if when == "between" else "at the peak of a step"
            yield _line(f"{base}: {MORE_BYTES:.0f} B a parameter {where} beyond mixed precision", f"{more:.2f}", more <= MORE_BYTES + EXACT)
    for row in result["passes"]:
        if row["pct_floor"] is not None and STOCHASTIC not in row["op"]:
            yield _line(f"{row['op']}: at least {PCT_FLOOR:.0f} % of its floor", f"{row['pct_floor']:.0f} %", row["pct_floor"] >= PCT_FLOOR)


def _line(bar: str, measured: str, passes: bool) -> str:
    return f"{bar}: {measured}: {'pass' if passes else 'FAIL'}"
