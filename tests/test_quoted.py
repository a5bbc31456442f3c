"""What a page quotes of a program's output is in the stored run: docs/runs, written by ``python -m bench.quoted``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench.quoted import BEGIN, END, PROGRAMS, PROVED, claims
from sam_kernels.cli.prove.command import CLAIMS

ROOT = Path(__file__).parents[1]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def stored(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(page(f"docs/runs/{name}.json"))
    assert not found["dirty"]
    assert found["command"] == f"python -m bench.quoted {name}"
    assert name in PROGRAMS
    return found


def test_the_quickstart_prints_what_its_page_shows() -> None:
    run, text = stored("quickstart"), page("docs/quickstart.md")
    assert "\n\n" + "".join(f"    {line}\n" for line in run["output"]) + "\n" in text
    assert f"torch {run['torch'].rpartition('.')[0]}, one thread" in text
    assert run["threads"] == 1


def test_the_language_model_scores_what_its_page_shows() -> None:
    text = page("docs/rw_sam.md").partition("## On text")[2].partition("\n## ")[0]
    lines = [line for output in stored("language_model")["output_by_seed"].values() for line in output]
    for name in ("AdamW", "SAM", "RW-SAM"):
        pattern = rf"^{name}: held-out text \S+ -> (\S+) \(best epoch: (\S+)\), training text (\S+)$"
        runs = [[float(each) for each in found.groups()] for line in lines if (found := re.match(pattern, line))]
        (row,) = re.findall(rf"^\| {name}(?:,[^|]*)? \| (\d[^|]*) \| (\d[^|]*) \| (\d[^|]*) \|$", text, re.MULTILINE)
        shown = [[float(each) for each in cell.split(", ")] for cell in row]
        assert len(runs) == 3
        for cells, measured in zip(zip(*shown, strict=True), runs, strict=True):
            assert all(abs(a - b) <= 0.00501 for a, b in zip(cells, measured, strict=True)), (name, cells, measured)  # three digits in two
    sizes = [float(each) for line in lines for each in re.findall(r"effective sample size (\S+),", line)]
    largest = max(float(each) for line in lines for each in re.findall(r"first step: .* largest weight (\S+)", line))
    assert f"sample size of {min(sizes[::2])} to {max(sizes[::2])} of 16, and a largest weight of up to {largest}" in text
    assert f"effective sample size is {min(sizes[1::2])} or more" in text


def test_the_claims_of_the_readme_are_those_that_were_checked() -> None:
    runs = {name: stored(name) for name in PROVED if (ROOT / "docs" / "runs" / f"{name}.json").exists()}
    assert page("README.md").partition(BEGIN)[2].partition(END)[0].strip() == claims(runs), "python -m bench.quoted"
    for run in runs.values():
        assert [each["name"] for each in run["claims"]] == [claim.name for claim in CLAIMS]


def test_a_table_of_claims_has_every_run() -> None:
    measured = {"effect": 12.345, "standard_error": 0.5}
    run = {"claims": [{"name": claim.name, "measured": measured} for claim in CLAIMS], "seconds": 20.4, "cpu": "A CPU", "cores": 1}
    run |= {"load_1min": 0.1, "commit": "abc"}
    run["claims"][0]["measured"] = None
    text = claims({"prove_quick": run})
    assert f"| {CLAIMS[0].statement} | {CLAIMS[0].needed} | – |" in text
    assert f"| {CLAIMS[1].statement} | {CLAIMS[1].needed} | 12.3 ± 0.5 |" in text
    assert "`make demo`: 20 s on A CPU, 1 core, load 0.1 when it began, commit abc." in text
