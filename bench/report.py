"""``python -m bench.report FILES``: a short table, all tables, and the chart, from result files. ``--check``: are they up to date?

Results of GPUs come after those of the CPU; there is a chart of the latter. Rows as JSON lines (``.jsonl``) are read as JSON files are, and
several files of one GPU, measured at one commit, are one result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bench import options
from bench.chart import draw
from bench.environment import SCHEMA
from bench.gpu import markdown as gpu_markdown
from bench.gpu import results as gpu_results
from bench.gpu.markdown import is_of_a_gpu
from bench.markdown import docs_section, short_section
from bench.page import BEGIN, END, ROOT, replace_section
from bench.tables import main_result

__all__ = ["load", "main"]

EMPTY_DOCS = f"# Benchmarks\n\n{BEGIN}\n{END}\n"


def load(paths: Sequence[Path]) -> list[dict[str, Any]]:
    results = [gpu_results.read(path) if path.suffix == ".jsonl" else json.loads(path.read_text()) for path in paths]
    for path, result in zip(paths, results, strict=True):
        if result.get("schema") != SCHEMA:
            raise click.ClickException(f"{path}: schema {result.get('schema')!r}, this version reads {SCHEMA}")
    devices = {result["device"] for result in results if not is_of_a_gpu(result)}
    if len(devices) > 1:
        raise click.ClickException(f"results of different devices do not go into one table: {', '.join(sorted(devices))}")
    of_gpus = [result for result in results if is_of_a_gpu(result)]
    return [*(result for result in results if not is_of_a_gpu(result)), *gpu_results.merge(of_gpus)]


@options.command
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--short", type=options.FILE(), default=ROOT / "docs/benchmarks/index.md", help="Page with the short table.")
@click.option("--docs", type=options.FILE(), default=ROOT / "docs/benchmarks.md", help="Default: docs/benchmarks.md.")
@click.option("--image", type=options.FILE(), default=ROOT / "docs/images/bench-steps.png", help="The chart.")
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 where a file would change.")
def main(files: tuple[Path, ...], short: Path, docs: Path, image: Path, check: bool) -> None:
    """Regenerate the section between the markers of both pages, and the chart. FILES: results of one CPU, one for each allocator
    regime, and of any GPUs."""
    results = load(files)
    of_cpu, of_gpus = [result for result in results if not is_of_a_gpu(result)], [result for result in results if is_of_a_gpu(result)]
    stale = []
    for path, section, gpu_section in (
        (short, short_section, gpu_markdown.short_section),
        (docs, docs_section, gpu_markdown.docs_section),
    ):
        text = path.read_text() if path.exists() else EMPTY_DOCS if path == docs else ""
        parts = [section(of_cpu, Path(os.path.relpath(image, path.parent)).as_posix())] if of_cpu else []
        wanted = replace_section(text, "\n\n".join(filter(None, [*parts, gpu_section(of_gpus)])), path.name)
        if not path.exists() or text != wanted:
            stale.append(path)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(wanted)
    if check:
        stale += [] if image.exists() or not of_cpu else [image]  # its pixels depend on matplotlib's version
        if stale:
            click.echo(f"out of date: {', '.join(path.name for path in stale)}")
            raise SystemExit(1)
        click.echo("up to date")
    else:
        if of_cpu:
            draw(main_result(of_cpu), image)
            stale.append(image)
        click.echo(f"written: {', '.join(path.name for path in stale)}")


if __name__ == "__main__":
    main(prog_name="python -m bench.report")
