"""The results of ``prove``: a table for the console, a page of Markdown, a figure, JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sam_kernels.cli import output
from sam_kernels.cli.prove.claims import Claim, Measured

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Result", "draw", "markdown", "table", "to_json"]


@dataclass(frozen=True)
class Result:
    claim: Claim
    found: Measured | None  # None: it could not be measured
    seconds: float
    error: str = ""

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "ERROR"
        return "holds" if self.claim.holds(self.found) else "FAILS"

    @property
    def effect(self) -> str:
        if self.found is None:
            return self.error
        sure = "" if self.found.standard_error is None else f" ± {self.found.standard_error:.2g}"
        return f"{self.found.effect:.3g}{sure} {self.claim.unit}"

    @property
    def needed(self) -> str:
        return self.claim.needed

    @property
    def bars(self) -> str:
        if self.found is None:
            return ""
        sure = [f" ± {bar.standard_error:.2g}" if bar.standard_error else "" for bar in self.found.bars]
        return ", ".join(f"{bar.label} {bar.mean:.3g}{each} {self.found.unit}" for bar, each in zip(self.found.bars, sure, strict=True))


def table(results: Sequence[Result]) -> Table:
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, caption="± standard error over the seeds.", caption_justify="left")
    for heading in ("", "claim", "measured", "difference, or ratio", "needed"):
        shown.add_column(heading)
    for each in results:
        style = {"holds": "green", "FAILS": "bold red", "ERROR": "bold red"}[each.verdict]
        shown.add_row(f"[{style}]{each.verdict}[/]", each.claim.statement, each.bars, each.effect, each.needed)
    return shown


def markdown(results: Sequence[Result], machine: Mapping[str, str], quick: bool) -> str:
    """A page that stands by itself, beside its figure."""
    lines = [
        "# What sam_kernels is worth on this machine",
        "",
        f"`python -m sam_kernels prove{' --quick' if quick else ''}` · " + " · ".join(f"{key} {value}" for key, value in machine.items()),
        "",
        "Thresholds are fixed in the code. ± is the standard error over the seeds, of differences seed by seed.",
        "",
        "![Measured](prove.png)",
        "",
        "| | claim | measured | difference, or ratio | needed | seconds |",
        "|---|---|---|---|---|---:|",
    ]
    lines += [f"| **{r.verdict}** | {r.claim.statement} | {r.bars} | {r.effect} | {r.needed} | {r.seconds:.0f} |" for r in results]
    settings = [f"* {r.claim.name}: " + ", ".join(f"{k} {v}" for k, v in r.found.settings.items()) for r in results if r.found]
    return "\n".join([*lines, "", "## Settings", "", *settings, ""])


def to_json(results: Sequence[Result], machine: Mapping[str, str], quick: bool) -> str:
    claims = [
        {
            "name": each.claim.name,
            "statement": each.claim.statement,
            "threshold": each.claim.threshold,
            "verdict": each.verdict,
            "seconds": round(each.seconds, 1),
            "error": each.error or None,
            "measured": None if each.found is None else asdict(each.found),
        }
        for each in results
    ]
    return output.to_json({"machine": dict(machine), "quick": quick, "claims": claims})


def draw(results: Sequence[Result], path: Path) -> None:
    """A panel for each claim. The base in grey; error bars are two standard errors."""
    from matplotlib.figure import Figure

    shown = [each for each in results if each.found is not None]
    columns = min(3, max(1, len(shown)))
    rows = -(-max(1, len(shown)) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.4 * rows), layout="constrained", facecolor="white")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    for axis, each in zip(axes, shown, strict=False):
        assert each.found is not None
        bars = each.found.bars
        errors = [2 * (bar.standard_error or 0.0) for bar in bars]
        base = len(bars) - 1 if each.claim.is_timed else 0
        colors = ["#9a9a9a" if k == base else "#1f6f8b" for k in range(len(bars))]
        axis.barh([bar.label for bar in bars], [bar.mean for bar in bars], xerr=errors, color=colors, capsize=3)
        axis.invert_yaxis()
        axis.set_title(f"{each.claim.name}: {each.verdict}", fontsize=10, color="#2c7a4b" if each.verdict == "holds" else "#b0413e")
        axis.set_xlabel("ms, shorter is faster" if each.found.unit == "ms" else f"{each.found.unit}, longer is better", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
