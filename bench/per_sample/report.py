"""``python -m bench.per_sample.report FILE``: the section of docs/per_sample.md from a result file. ``--check``: is it up to date?"""

from __future__ import annotations

from typing import Any

from bench.page import page_command, table, where
from bench.per_sample.bars import as_table
from bench.per_sample.models import MODELS
from bench.per_sample.providers import PROVIDERS

__all__ = ["section"]


def section(result: dict[str, Any]) -> str:
    """Markdown: the passes, the figures to reach, and where they were measured."""
    rows = result["rows"]
    plain = {row["model"]: row["ms_50"] for row in rows if row["provider"] == "plain"}
    cells = []
    for row in rows:
        memory = f"{row['extra_bytes'] / 2**20:.0f} MiB" if "extra_bytes" in row and row["provider"] != "plain" else ""
        times = " / ".join(f"{row[key]:.1f}" for key in ("ms_20", "ms_50", "ms_80"))
        ratio = f"{row['ms_50'] / plain[row['model']]:.2f}" if row["model"] in plain else ""
        cells.append((MODELS[row["model"]].title, PROVIDERS[row["provider"]].title, times, ratio, memory))
    passes = table(("pass", "who", "ms (20 / 50 / 80 %)", "over a plain pass", "memory beyond a plain pass"), cells, "llr")
    return "\n".join([passes, "", *as_table(rows), "", f"{where(result)}."])


main = page_command(section, "per_sample.md")

if __name__ == "__main__":
    main(prog_name="python -m bench.per_sample.report")
