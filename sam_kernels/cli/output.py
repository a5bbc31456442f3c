"""Where a command's words go: tables to a console, progress to it as well, JSON to stdout alone."""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["INTERRUPTED", "Ticker", "console_for", "rounded", "to_json"]

INTERRUPTED = 130  # exit status after Ctrl-C, as a shell has it: 128 + SIGINT
_WIDE = 1000  # columns: no row of a table is as long


def console_for(*, as_json: bool) -> Console:
    """Return a console on stdout, or on stderr where stdout is for the JSON.

    Without a terminal it is so wide that no row of a table wraps: each can be found with grep.
    """
    from rich.console import Console

    console = Console(stderr=as_json)
    return console if console.is_terminal else Console(stderr=as_json, width=_WIDE)


class Ticker:
    """Prints a line of progress at most every ten seconds where no terminal shows a bar. Each line is flushed."""

    every = 10.0  # seconds

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = time.monotonic()

    def tick(self, line: str) -> None:
        if not self._console.is_terminal and time.monotonic() - self._last >= self.every:
            self.say(line)

    def say(self, line: str) -> None:
        """Print a line whenever it comes; the next ten seconds begin with it."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._last = time.monotonic()


def to_json(report: Any) -> str:
    """Return ``report`` as strict JSON. Numbers that are not finite become null: JSON has no word for them."""
    return json.dumps(_finite(report), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rounded(value: float, decimals: int) -> float:
    """Return the value rounded for a table; what rounds to 0 has no sign."""
    return round(value, decimals) + 0.0
