"""``python -m bench.per_sample``: gradient norms per sample, whole passes in turns in one process; memory in a process each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench import options
from bench.command import begin, new_result, write
from bench.per_sample import memory
from bench.per_sample.bars import verdicts
from bench.per_sample.models import MODELS, runs_of
from bench.per_sample.providers import PROVIDERS
from bench.timing import interleave, quantiles

__all__ = ["main", "measure"]

TESTS = ("tests/per_sample", *(f"tests/ops/test_per_sample_{name}.py" for name in ("linear", "conv", "sums", "native")))


def measure(model: str, names: list[str], rounds: int, *, with_memory: bool, console: Console) -> Iterator[dict[str, Any]]:
    runs = runs_of(model, names, PROVIDERS, console)
    norms = {name: result.double() for name, run in runs.items() if (result := run()) is not None}
    exact = norms.get("norms")
    rounds *= MODELS[model].turns
    samples = interleave(runs, rounds=rounds, warmup=1)
    peaks = {name: memory.peak_bytes(model, name) for name in runs} if with_memory else {}
    for name in runs:
        q = quantiles(samples[name])
        row = {
            "kind": "per_sample",
            "model": model,
            "provider": name,
            "rounds": rounds,
            "ms_20": q.ms_20,
            "ms_50": q.ms_50,
            "ms_80": q.ms_80,
        }
        if exact is not None and name in norms:
            row["norms_differ"] = ((norms[name] - exact).abs() / exact).max().item()
        peak, plain = peaks.get(name), peaks.get("plain")
        if peak is not None:
            row["peak_bytes"] = peak
            if plain is not None:
                row["extra_bytes"] = max(0, peak - plain)
        yield row


@options.command
@options.names("--model", "models", known=MODELS, help="Which passes.")
@options.names("--providers", known=PROVIDERS, help="Whose.")
@click.option("--rounds", type=click.IntRange(min=1), default=12, show_default=True, help="Turns of each.")
@options.threads()
@click.option("--memory/--no-memory", "with_memory", default=True, help="How far the resident set rises, in processes of their own.")
@options.gate()
@options.JSON
@options.store("per_sample")
def main(
    models: list[str],
    providers: list[str],
    rounds: int,
    threads: int | None,
    with_memory: bool,
    with_gate: bool,
    json_path: Path | None,
    store: bool,
) -> None:
    """Gradient norms of every sample, with and without the batch's gradient, against a plain pass, Opacus and torch.func."""
    console = begin(threads)
    result = new_result(with_gate, TESTS)
    for model in models:
        result["rows"] += measure(model, providers, rounds, with_memory=with_memory, console=console)
    _print(result["rows"], console)
    write(result, json_path, "per_sample" if store else None)


def _print(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("pass", "provider", "ms (20/50/80 %)", "over a plain pass", "memory", "beyond a plain pass")
    for row in rows:
        plain = next((other["ms_50"] for other in rows if other["provider"] == "plain" and other["model"] == row["model"]), None)
        table.add_row(
            MODELS[row["model"]].title,
            PROVIDERS[row["provider"]].title,
            f"{row['ms_20']:.1f} / {row['ms_50']:.1f} / {row['ms_80']:.1f}",
            "" if plain is None else f"{row['ms_50'] / plain:.2f}",
            f"{row['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in row else "",
            f"{row['extra_bytes'] / 2**20:.0f} MiB" if "extra_bytes" in row else "",
        )
    console.print(table)
    for line in verdicts(rows):
        console.print(line, highlight=False)


if __name__ == "__main__":
    main(prog_name="python -m bench.per_sample")
