"""``python -m bench.importance.report FILE``: the section of docs/sampling.md from a result file. ``--check``: is it up to date?"""

from __future__ import annotations

from typing import Any

from bench.importance.problem import PROBLEMS
from bench.importance.run import WAYS
from bench.page import count, page_command, table

__all__ = ["faster", "main", "section"]


HEADINGS = ("λ", "sampling", "ρ", "γ", "bound: γμ", "measured rate", "over uniform", "floor: bound", "measured")


def faster(rows: list[dict[str, Any]], row: dict[str, Any]) -> float:
    """How many times the steps uniform sampling needs for the same decay, with the same λ."""
    uniform = next(other for other in rows if other["way"] == "uniform" and other["lambd"] == row["lambd"])
    return float(row["rate_measured"] / uniform["rate_measured"])


def section(result: dict[str, Any]) -> str:
    """Markdown: a table for each problem, and how it was measured."""
    parts = []
    for problem in result["problems"]:
        parts.append(
            f"**{PROBLEMS[problem['problem']]}**: L_max {problem['L_max']:.4g}, L_avg {problem['L_avg']:.4g}, "
            f"L_min {problem['L_min']:.4g}, μ {problem['mu']:.3g}."
        )
        cells = []
        for row in sorted(problem["rows"], key=lambda row: row["lambd"]):
            floor = "not reached" if row["floor_measured"] is None else f"{row['floor_measured']:.2g}"
            cells.append(
                [
                    f"{row['lambd']:g}",
                    WAYS[row["way"]],
                    *(f"{row[key]:.2g}" for key in ("rho", "gamma", "rate_predicted", "rate_measured")),
                    f"{faster(problem['rows'], row):.1f}×",
                    f"{row['floor_predicted']:.2g}",
                    floor,
                ]
            )
        parts.append(table(HEADINGS, cells, "rlr"))
    parts.append(f"{result['steps']:,} steps, mean of {count(result['seeds'], 'seed')}, float64; commit {result['commit']}.")
    return "\n\n".join(parts)


main = page_command(section, "sampling.md")

if __name__ == "__main__":
    main(prog_name="python -m bench.importance.report")
