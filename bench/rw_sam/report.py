"""``python -m bench.rw_sam.report FILE``: the section of docs/rw_sam.md from a result file. ``--check``: is it up to date?"""

from __future__ import annotations

from typing import Any

from bench.page import page_command, table, where
from bench.per_sample.bars import as_table
from bench.per_sample.models import MODELS
from bench.rw_sam import quality
from bench.rw_sam.bars import BARS, over_sam
from bench.rw_sam.providers import PROVIDERS

__all__ = ["section"]


def section(result: dict[str, Any]) -> str:
    """Markdown: the steps, the rank correlations, the figures to reach, and where they were measured."""
    steps, found = ([row for row in result["rows"] if row["kind"] == kind] for kind in ("rw_sam", "quality"))
    timed, ranked = [], []
    for row in steps:
        times = " / ".join(f"{row[key]:.1f}" for key in ("ms_20", "ms_50", "ms_80"))
        timed.append((MODELS[row["model"]].title, PROVIDERS[row["provider"]].title, times, over_sam(row)))
    for row in found:
        spread = f"{row['least']:.3f} – {row['greatest']:.3f} ({row['draws']})" if row["draws"] > 1 else ""
        titles = quality.MODELS[row["model"]].title, quality.ESTIMATES[row["provider"]].title
        ranked.append((*titles, f"{row['rank_correlation']:.4f}", spread))
    step_table = table(("model", "a whole step of", "ms (20 / 50 / 80 %)", "over SAM in the same round"), timed, "llr")
    rank_table = table(("model", "norms", "rank correlation with the true norms", "over draws"), ranked, "llr")
    return "\n".join([step_table, "", rank_table, "", *as_table(result["rows"], BARS), "", f"{where(result)}."])


main = page_command(section, "rw_sam.md")

if __name__ == "__main__":
    main(prog_name="python -m bench.rw_sam.report")
