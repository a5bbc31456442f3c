"""Results from the rows of one run, or of several runs on one device.

Rows of kind "run" say where and how the others were measured; later ones add to earlier ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import dispatch

__all__ = ["merge", "read", "result_of"]

Row = Mapping[str, Any]
# Results that agree in these are results of one device.
SAME = ("gpu", "driver", "cuda", "torch", "triton", "commit", "dirty")


def result_of(rows: Iterable[Row]) -> dict[str, Any]:
    """What rows of kind "run" say, and under ``rows`` the measurements with those of kind "dispatch", which follow from them."""
    found: dict[str, Any] = {}
    measured = []
    for row in rows:
        if row["kind"] == "run":
            found |= {key: value for key, value in row.items() if key != "kind"}
        elif row["kind"] not in ("test", "phase"):
            measured.append(dict(row))
    return found | {"rows": [*measured, *dispatch.rows(measured)]}


def read(path: Path) -> dict[str, Any]:
    """A result from a file of rows. A last line without an end was cut off, and does not count."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return result_of(json.loads(line) for line in lines if line)


def merge(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of one device and commit become one; of a case that was measured twice, the later rows count."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in results:
        key = tuple(result.get(name) for name in SAME)
        before = found.get(key, {"rows": []})
        again = {_case(row) for row in result["rows"]}
        measured = [row for row in before["rows"] if _case(row) not in again] + result["rows"]
        measured = [row for row in measured if row["kind"] != "dispatch"]
        found[key] = before | result | {"rows": [*measured, *dispatch.rows(measured)]}
    return list(found.values())


def _case(row: Row) -> tuple[Any, ...]:
    """What was measured. The cuts that a sweep found are no cases: all of one sweep go when there is another."""
    names = (key for key, value in row.items() if key in ("tokens", "in_features", "out_features") or isinstance(value, str))
    return tuple((name, row[name]) for name in sorted(names) if name not in ("names", "note", "cut"))
