"""Measured figures in the prose of a page come from a run that is stored: the section names it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = re.compile(r"<!-- (\S+?): ?begin -->.*?<!-- \1: ?end -->", re.DOTALL)  # tests of their own compare it with its file
CODE = re.compile(r"```.*?```", re.DOTALL)
NUMBER = r"(?<![\w.])\d[\d.,]*"
MEASURED = re.compile(
    rf"{NUMBER} (?:ms|µs|ns|GB/s|GFLOPS|seconds|minutes|points|times (?:as (?:long|fast)|SAM's|faster|slower))(?!\w)|"
    rf"{NUMBER} % (?:faster|slower|behind|ahead)|{NUMBER} ± \d|[+−]\d[\d.]* %"
)
# What leads to a stored run: a command that makes one, its file, a generated part of the section, or another page.
SOURCE = re.compile(r"python -m (?:bench|sam_kernels)\b|make gpu|docs/runs/|begin -->|\]\([\w./]+\.md[)#]")
FILES = re.compile(r"(?:docs/runs|bench/results)/[\w./*-]+\.json\b")


def without_source(text: str) -> list[str]:
    """Return the first measured figure of each section that leads to no stored run.

    A section begins with a heading of the second level. A page that begins with its command names it for all its sections.
    """
    head, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    if "python -m bench" in head:
        return []
    prose = {part: CODE.sub("", GENERATED.sub("", part)) for part in (head, *sections)}
    return [found[0] for part, shown in prose.items() if (found := MEASURED.search(shown)) and not SOURCE.search(part)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_measured_figures_lead_to_a_stored_run(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert without_source(text) == []
    for name in FILES.findall(text):
        assert list(ROOT.glob(name)), name


@pytest.mark.parametrize(
    "figure",
    ["takes 60 µs", "is 5 % slower", "97.2 ± 0.2", "−10 % of a step", "0.3 points", "20 seconds", "1.5 times as long", "1,000 ms"],
)
def test_a_figure_without_a_source_is_found(figure: str) -> None:
    page = f"# Title\n\n## One\n\n`python -m bench`: 3 ms.\n\n## Two\n\nThis {figure}.\n"
    assert len(without_source(page)) == 1
    assert without_source(page + "See docs/runs/a.json.\n") == []
    assert without_source(f"# Title\n\n    python -m bench.dial\n\n## Two\n\nThis {figure}.\n") == []
