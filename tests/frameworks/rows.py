"""The table of docs/guides/frameworks.md: a row for each comparison that a test makes, with the error that it measured."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from bench.page import BEGIN, END, ROOT, rewrite, table

__all__ = ["Row", "names_on_page", "write"]

PAGE = ROOT / "docs" / "guides" / "frameworks.md"
HEADINGS = ("framework", "version", "algorithm", "compared", "error")


@dataclass(frozen=True, order=True)
class Row:
    """``error``: the largest relative one, in words: ``"3e-16"`` or ``"same bits"``."""

    framework: str
    version: str
    algorithm: str
    compared: str
    error: str

    @property
    def name(self) -> tuple[str, str, str]:
        """What does not depend on the environment."""
        return self.framework, self.algorithm, self.compared


def write(rows: set[Row]) -> None:
    """Puts the table in the place of the page's own."""
    rewrite(PAGE, table(HEADINGS, map(astuple, sorted(rows)), "lllll"), check=False)


def names_on_page() -> set[tuple[str, str, str]]:
    """The names of the page's rows."""
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return {Row(*(cell.strip() for cell in line.strip("|").split("|"))).name for line in lines}
