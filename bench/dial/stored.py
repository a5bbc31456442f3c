"""The result file: what is in it is kept, and added to as soon as it is measured, so that an interrupted stage goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from bench.dial.tasks import Task

__all__ = ["Stored"]

Row = dict[str, Any]


class Stored:
    """Rows of both stages by task and method, and single runs. Refuses a file of another device, or whose tasks had other settings.

    ``where``: the environment and the gate's line; that of the last call stands at the top, that of each stage's last call in ``stages``.
    """

    def __init__(self, path: Path, where: Row, tasks: Mapping[str, Task], *, quick: bool) -> None:
        self._path = path
        empty: dict[str, Any] = {"quick": quick, "stages": {}, "tasks": {}, "cost": [], "accuracy": [], "runs": []}
        before = json.loads(path.read_text()) if path.exists() else empty
        if before.get("device", where["device"]) != where["device"]:
            raise click.ClickException(f"{path}: was measured on {before['device']}, this is {where['device']}: give another --out")
        self.result = where | {key: before[key] for key in empty}
        for name, task in tasks.items():
            settings, then = task.settings(), self.result["tasks"].get(name)
            if then not in (None, settings):
                changed = [f"{key} {then.get(key)!r}, now {value!r}" for key, value in settings.items() if then.get(key) != value]
                raise click.ClickException(f"{path}: {name} was run with {'; '.join(changed)}: give another --out, or remove the file")
            self.result["tasks"][name] = settings
        if self.result["quick"] != quick:
            raise click.ClickException(f"{path}: quick and full runs do not mix: give another --out, or remove the file")

    def replace(self, stage: str, rows: Sequence[Row]) -> None:
        """Put rows in the place of those of the same tasks and methods, and write the file."""
        known = {(row["task"], row["method"]) for row in rows}
        self.result[stage] = [row for row in self.result[stage] if (row["task"], row["method"]) not in known] + list(rows)
        self.write()

    def costs(self, task: str) -> dict[str, float]:
        """Return the costs over the base that are stored for a task, by method."""
        return {row["method"]: row["of_base"][1] for row in self.result["cost"] if row["task"] == task}

    def write(self) -> None:
        """Replace the file at once: one that is interrupted is the file before."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        parts = [f"{json.dumps(key)}: {_lines(value)}" for key, value in self.result.items()]
        new.write_text("{\n" + ",\n".join(parts) + "\n}\n")
        os.replace(new, self._path)


def _lines(value: Any) -> str:
    """Return JSON with a line for each element of a list: a thousand runs are to be read, and compared, line by line."""
    if not isinstance(value, list) or not value:
        return json.dumps(value)
    return "[\n " + ",\n ".join(map(json.dumps, value)) + "\n]"
