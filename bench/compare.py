"""``python -m bench.compare OLD.json NEW.json``: medians and ratios of two result files of the same kind that differ.

Exit status: 0 where nothing differs by more than the threshold, 1 where something does, 2 where the files cannot be compared.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench import options

__all__ = ["Change", "NotComparable", "changes", "main", "measurements", "read"]

Key = tuple[str, ...]
# Settings that are part of what was measured; rows with other values are other rows. Strings are so as well, but for these:
SETTINGS = ("micro_batches", "batch", "n_tensors", "numel", "tensors", "elements", "threads")
REMARKS = ("note", "floor", "regime", "version", "fastest_loop")
SAME = ("device", "threads", "quick")  # of the whole result: other values, no comparison


class NotComparable(click.ClickException):
    """The files do not hold the same kind of measurements, or are no result files."""

    exit_code = 2


class Change:
    """One figure in both files. ``by``: how much the larger one exceeds the smaller, so that their order does not matter."""

    def __init__(self, key: Key, old: float, new: float) -> None:
        self.key, self.old, self.new = key, old, new
        if old == new:
            self.by = 0.0
        elif min(old, new) > 0 and math.isfinite(old + new):
            self.by = max(old, new) / min(old, new) - 1
        else:
            self.by = math.inf  # NaN differs from everything


def read(path: Path) -> dict[str, Any]:
    """Return a result file. Raises NotComparable for what is no JSON, or no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NotComparable(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise NotComparable(f"{path}: a {type(found).__name__}, not a result of a benchmark")
    return found


def measurements(result: Mapping[str, Any]) -> dict[Key, float]:
    """Return the medians ("ms…") and ratios ("over_…", "of_…", "ratios") of all rows, by what they were measured of.

    Those of the result itself, beside its rows, are taken as well.
    """
    found: dict[Key, float] = {("all", *metric): value for metric, value in _figures(result)}
    for name, rows in result.items():
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            continue
        for row in rows:
            place = _place(name, row)
            for metric, value in _figures(row):
                found[(*place, *metric)] = value
    return found


def _place(name: str, row: Mapping[str, Any]) -> Key:
    parts = [] if name == "rows" else [name]
    parts += [value for key, value in row.items() if isinstance(value, str) and key not in REMARKS]
    parts += [f"{key} {row[key]}" for key in SETTINGS if key in row and not isinstance(row[key], str)]
    return tuple(dict.fromkeys(parts))


def _figures(row: Mapping[str, Any]) -> Iterator[tuple[Key, float]]:
    """Names and values. A list of three is 20, 50 and 80 %; a mapping has a figure for each implementation."""
    for key, value in row.items():
        if not _is_figure(key):
            continue
        for name, each in value.items() if isinstance(value, dict) else [("", value)]:
            middle = each[1] if isinstance(each, list) and len(each) == 3 else each
            if isinstance(middle, int | float):
                yield (name, key) if name else (key,), float(middle)


def _is_figure(key: str) -> bool:
    if key.endswith(("_20", "_80")):
        return False
    return key in ("ms", "ms_50") or _is_ratio(key)


def _is_ratio(key: str) -> bool:
    return key == "ratios" or key.startswith(("over_", "of_"))


def changes(old: Mapping[str, Any], new: Mapping[str, Any], only: str = "all") -> list[Change]:
    """Return the figures of both, the largest difference first. Raises NotComparable where there are none in common."""
    for key in SAME:
        if key in old and key in new and old[key] != new[key]:
            raise NotComparable(f"{key}: {old[key]!r} in the old file, {new[key]!r} in the new one")
    before, after = (_chosen(measurements(each), only) for each in (old, new))
    both = [key for key in before if key in after]
    if not both:
        raise NotComparable(f"nothing in common: {len(before)} figures in the old file, {len(after)} in the new one")
    return sorted((Change(key, before[key], after[key]) for key in both), key=lambda change: -change.by)


def _chosen(found: dict[Key, float], only: str) -> dict[Key, float]:
    return {key: value for key, value in found.items() if only == "all" or _is_ratio(key[-1]) is (only == "ratios")}


@options.command
@click.argument("old", type=options.FILE(exists=True))
@click.argument("new", type=options.FILE(exists=True))
@click.option("--threshold", type=click.FloatRange(min=0), default=0.10, show_default=True, help="Largest difference allowed, as a share.")
@click.option("--only", type=click.Choice(("all", "ratios", "medians")), default="all", show_default=True, help="Figures to compare.")
def main(old: Path, new: Path, threshold: float, only: str) -> None:
    """Compare the medians and ratios of two result files, OLD and NEW. Exit with 1 where one differs by more than the threshold."""
    before, after = read(old), read(new)
    found = changes(before, after, only)
    over = [change for change in found if change.by > threshold]
    console = Console() if Console().is_terminal else Console(width=180)
    if over:
        table = Table("measured", "figure", "old", "new", "new / old")
        for change in over:
            ratio = f"{change.new / change.old:.3f}" if change.old else "–"
            table.add_row(", ".join(change.key[:-1]), change.key[-1], f"{change.old:.5g}", f"{change.new:.5g}", ratio)
        console.print(table)
    kept = [_chosen(measurements(each), only).keys() for each in (before, after)]
    for name, missing in (("old", kept[0] - kept[1]), ("new", kept[1] - kept[0])):
        if missing:
            console.print(f"only in the {name} file: {len(missing)} figures, for example {', '.join(sorted(missing)[0])}", highlight=False)
    largest = found[0]
    console.print(
        f"{len(over)} of {len(found)} figures differ by more than {threshold:.0%}; the largest difference is {largest.by:.1%} "
        f"({', '.join(largest.key)})",
        highlight=False,
    )
    sys.exit(1 if over else 0)


if __name__ == "__main__":
    main(prog_name="python -m bench.compare")
