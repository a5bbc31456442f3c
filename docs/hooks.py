"""MkDocs: files of the repository outside ``docs`` that pages link to become part of the site, under ``repository/``."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\((\.\./[^)\s#]+)")
MADE = "repository"


def _outside(page: str, link: str) -> str | None:
    """The path from the repository's root of what a page of ``docs`` links to; None for a page of ``docs``."""
    path = os.path.normpath(PurePosixPath("docs", page).parent / link)
    return None if path.startswith("docs" + os.sep) else path


def on_files(files: Files, config: Any) -> Files:
    """Adds every file that is linked to. Raises FileNotFoundError for one that does not exist."""
    wanted = {
        path
        for page in files.documentation_pages()
        for link in LINK.findall(page.content_string)
        if (path := _outside(page.src_uri, link)) is not None
    }
    for path in sorted(wanted):
        text = (ROOT / path).read_text(encoding="utf-8")
        content = text if path.endswith(".md") else f"# {path}\n\n```{Path(path).suffix[1:]}\n{text}```\n"
        name = path if path.endswith(".md") else f"{path}.md"
        files.append(File.generated(config, f"{MADE}/{name}", content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points the links there, and those of such a file into the pages."""
    source = page.file.src_uri
    if source.startswith(f"{MADE}/"):
        inside = os.path.relpath(PurePosixPath("."), PurePosixPath(source).parent)
        return re.sub(r"\]\(docs/", f"]({inside}/", markdown)

    def moved(found: re.Match[str]) -> str:
        path = _outside(source, found[1])
        if path is None:
            return found[0]
        name = path if path.endswith(".md") else f"{path}.md"
        return f"]({os.path.relpath(f'{MADE}/{name}', PurePosixPath(source).parent)}"

    return LINK.sub(moved, markdown)
