"""``python -m bench.rw_sam``: a step of RWSAM over one of SAM, in turns in one process, and how well each kind of norms ranks samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench import gate, options
from bench.command import begin, new_result, write
from bench.per_sample.__main__ import TESTS as PER_SAMPLE_TESTS
from bench.per_sample.bars import verdicts
from bench.per_sample.models import MODELS, runs_of
from bench.rw_sam import quality
from bench.rw_sam.bars import BARS, over_sam
from bench.rw_sam.providers import PROVIDERS
from bench.timing import interleave, quantiles

__all__ = ["main", "measure"]

WEIGHTS_TESTS = ("tests/ops/test_sharpness.py", "tests/ops/test_sharpness_compile.py")
TESTS = (
    *PER_SAMPLE_TESTS,
    *WEIGHTS_TESTS,
    *sorted(f"tests/optim/{path.name}" for path in (gate.ROOT / "tests" / "optim").glob("test_rwsam*.py")),
)


def measure(model: str, names: list[str], rounds: int, console: Console) -> Iterator[dict[str, Any]]:
    runs = runs_of(model, names, PROVIDERS, console)
    rounds *= MODELS[model].turns
    samples = interleave(runs, rounds=rounds, warmup=1)
    for name in runs:
        q = quantiles(samples[name])
        row: dict[str, Any] = {"kind": "rw_sam", "model": model, "provider": name, "rounds": rounds}
        row |= {"ms_20": q.ms_20, "ms_50": q.ms_50, "ms_80": q.ms_80}
        if "sam" in runs:  # round by round: a clock that changes in between changes both
            over = quantiles([ms / sam for ms, sam in zip(samples[name], samples["sam"], strict=True)])
            row |= {"over_sam_20": over.ms_20, "over_sam_50": over.ms_50, "over_sam_80": over.ms_80}
        yield row


@options.command
@options.names("--model", "models", known=MODELS, help="Whose steps.")
@options.names("--providers", known=PROVIDERS, help="Which steps.")
@click.option("--rounds", type=click.IntRange(min=1), default=12, show_default=True, help="Turns of each; of the MLP four times as many.")
@options.threads()
@click.option("--quality/--no-quality", "with_quality", default=True, help="Rank correlations of the weights with the true norms.")
@options.gate("Run the tests of the norms and of RWSAM first.")
@options.JSON
@options.store("rw_sam")
def main(
    models: list[str],
    providers: list[str],
    rounds: int,
    threads: int | None,
    with_quality: bool,
    with_gate: bool,
    json_path: Path | None,
    store: bool,
) -> None:
    """Whole steps of Reweighted SAM with each kind of norms over a step of SAM, and how well those norms rank the samples."""
    console = begin(threads)
    result = new_result(with_gate, TESTS)
    console.print(f"gate {result['gate']}", highlight=False, soft_wrap=True)
    for model in models:
        result["rows"] += measure(model, providers, rounds, console)
    if with_quality:
        for model in quality.MODELS:
            result["rows"] += quality.measure(model, quality.trained(model))
    _print(result["rows"], console)
    write(result, json_path, "rw_sam" if store else None)


def _print(rows: list[dict[str, Any]], console: Console) -> None:
    steps = Table("model", "a whole step of", "ms (20/50/80 %)", "over SAM (20/50/80 %)")
    ranks = Table("model", "norms", "rank correlation with the true norms", "over draws")
    for row in rows:
        if row["kind"] == "quality":
            titles = quality.MODELS[row["model"]].title, quality.ESTIMATES[row["provider"]].title
            spread = f"{row['least']:.3f} – {row['greatest']:.3f}" if row["draws"] > 1 else ""
            ranks.add_row(*titles, f"{row['rank_correlation']:.4f}", spread)
            continue
        times = f"{row['ms_20']:.1f} / {row['ms_50']:.1f} / {row['ms_80']:.1f}"
        steps.add_row(MODELS[row["model"]].title, PROVIDERS[row["provider"]].title, times, over_sam(row))
    for table in (steps, ranks):
        if table.row_count:
            console.print(table)
    for line in verdicts(rows, BARS):
        console.print(line, highlight=False)


if __name__ == "__main__":
    main(prog_name="python -m bench.rw_sam")
