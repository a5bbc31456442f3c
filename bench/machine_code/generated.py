"""Generated parts of docs/kernels.md, each between two markers."""

from __future__ import annotations

from pathlib import Path

__all__ = ["PAGE", "between_markers", "write"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"


def _markers(part: str) -> tuple[str, str]:
    return f"<!-- {part}: begin -->\n", f"<!-- {part}: end -->\n"


def between_markers(text: str, part: str) -> str:
    """What is generated in a page."""
    begin, end = _markers(part)
    return text.split(begin)[1].split(end)[0].strip("\n") + "\n"


def write(path: Path, part: str, generated: str) -> None:
    """Replaces what is generated in a page."""
    begin, end = _markers(part)
    text = path.read_text(encoding="utf-8")
    head, tail = text.split(begin)[0], text.split(end)[1]
    path.write_text(f"{head}{begin}\n{generated}\n{end}{tail}", encoding="utf-8")
