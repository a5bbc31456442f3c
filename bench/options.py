"""Options that several benchmarks have in common, in one wording."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import click

from bench import allocator

__all__ = ["ALLOCATOR", "FILE", "JSON", "MEMORY_BUDGET", "Names", "allocator_of_glibc", "command", "gate", "names", "store", "threads"]

FILE = partial(click.Path, dir_okay=False, path_type=Path)
Option = Callable[[Any], Any]


def command(main: Callable[..., Any]) -> click.Command:
    return click.command(context_settings={"help_option_names": ["-h", "--help"]})(main)


class Names(click.ParamType):
    """Comma-separated names out of a fixed set."""

    name = "names"

    def __init__(self, known: list[str]) -> None:
        self.known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        if isinstance(value, list):
            return value
        names = [name.strip() for name in value.split(",") if name.strip()]
        unknown = [name for name in names if name not in self.known]
        if unknown:
            self.fail(f"unknown: {', '.join(unknown)}; the names are {', '.join(self.known)}", param, ctx)
        return names


def names(*flags: str, known: Iterable[str], help: str, default: Iterable[str] | None = None, show_default: bool = True) -> Option:
    """An option that takes some of the known names, separated by commas. Default: all."""
    known = list(known)
    default = ",".join(known if default is None else default)
    return click.option(*flags, type=Names(known), default=default, show_default=show_default, help=help)


def threads(help: str = "Default: torch's.") -> Option:
    return click.option("--threads", type=click.IntRange(min=1), help=help)


def gate(help: str = "Run the tests of the operations first.") -> Option:
    return click.option("--gate/--no-gate", "with_gate", default=True, help=help)


def store(name: str, more: str = "") -> Option:
    return click.option("--store", is_flag=True, help=f"Write bench/results/<device>/{name}.json{more}.")


def allocator_of_glibc(default: str = "default") -> Option:
    return click.option(
        "--allocator",
        "regime",
        type=click.Choice(list(allocator.REGIMES)),
        default=default,
        show_default=True,
        help="Regime of glibc's allocator, set by starting a new process: whether freed memory goes back to the system.",
    )


ALLOCATOR = allocator_of_glibc()
JSON = click.option("--json", "json_path", type=FILE(), help="Where to write the result file.")
MEMORY_BUDGET = click.option(
    "--memory-budget", type=click.FloatRange(min=1), default=14.0, show_default=True, help="GiB; providers are split to fit."
)
