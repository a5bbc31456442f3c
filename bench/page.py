"""Results on the pages: Markdown tables, the part of a page that is generated, and the command that writes or checks it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from bench.options import FILE, command

__all__ = [
    "BEGIN",
    "END",
    "ROOT",
    "count",
    "page_command",
    "page_options",
    "replace_between",
    "replace_section",
    "rewrite",
    "table",
    "where",
]

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
ROOT = Path(__file__).parent.parent


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], align: str = "lr") -> str:
    """Return a table. ``align`` has ``l`` or ``r``, left or right, for each column; its last letter is repeated."""
    rules = {"l": "---", "r": "---:"}
    columns = align + align[-1] * (len(headings) - len(align))
    lines = [f"| {' | '.join(headings)} |", f"|{'|'.join(rules[column] for column in columns)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def count(number: int, noun: str) -> str:
    """Return "1 thread", "2 threads"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def where(result: dict[str, Any]) -> str:
    """Return where a result was measured, without a full stop."""
    versions = f"torch {result['torch']}, commit {result['commit']}"
    device = f"{result['cpu']}, {count(result['threads'], 'thread')}, {result['instruction_set']}"
    return f"{device}, {versions}; allocator: {result['allocator']}"


def replace_section(text: str, section: str, name: str) -> str:
    """Return ``text`` with the part between the markers of benchmarks replaced."""
    return replace_between(text, section, name, BEGIN, END)


def replace_between(text: str, section: str, name: str, begin: str, end: str) -> str:
    """Return ``text`` with the part between two markers replaced. Raises click.ClickException where they are not there once, in order."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise click.ClickException(f"{name}: needs one line '{begin}' and after it one line '{end}'")
    return f"{text[: text.index(begin)]}{begin}\n{section}\n{text[text.index(end) :]}"


def rewrite(page: Path, section: str, *, check: bool) -> None:
    """Write the section into the page. With ``check``, write nothing, and exit with 1 if the page would change."""
    text = page.read_text()
    wanted = replace_section(text, section, page.name)
    if not check:
        page.write_text(wanted)
    elif text != wanted:
        click.echo(f"out of date: {page.name}")
        raise SystemExit(1)


def page_options(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """The arguments of a command that writes parts of docs/``name`` from a result file."""

    def decorated(main: Callable[..., None]) -> click.Command:
        main = click.option("--check", is_flag=True, help="Write nothing; exit with 1 where the file would change.")(main)
        main = click.option("--docs", type=FILE(), default=ROOT / "docs" / name, help=f"Default: docs/{name}.")(main)
        return command(click.argument("file", type=FILE(exists=True))(main))

    return decorated


def page_command(section: Callable[[dict[str, Any]], str], name: str) -> click.Command:
    """Return the command that writes the section of a result file into docs/``name``."""

    @page_options(name)
    def main(file: Path, docs: Path, check: bool) -> None:
        """Regenerates the section between the markers from FILE."""
        rewrite(docs, section(json.loads(file.read_text())), check=check)

    return main
