"""Blocks of code on the pages, by the heading that they stand under."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["blocks_under", "code_after", "code_before"]

ROOT = Path(__file__).parents[2]


def blocks_under(page: str, heading: str, language: str) -> list[str]:
    """The blocks of a language between a heading and the next one of any level. Raises LookupError where there are none."""
    parts = re.split(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = dict(zip(parts[1::2], parts[2::2], strict=True)).get(heading, "")
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    if not found:
        raise LookupError(f"{page}: no block of {language} under {heading!r}")
    return found


def code_after(diff: str) -> str:
    """What a diff leaves: lines that stay or are added."""
    return _side(diff, "-")


def code_before(diff: str) -> str:
    """What a diff begins with: lines that stay or are removed."""
    return _side(diff, "+")


def _side(diff: str, other: str) -> str:
    return "".join(f"{line[1:]}\n" for line in diff.splitlines() if not line.startswith(other))
