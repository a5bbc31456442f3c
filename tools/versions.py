"""``make versions``: the oldest torch that is promised and the newest that is pinned, each with a subset of the tests, as a table.

The subset is the operations against the float64 reference, the steps against their formulas, checkpoints and loss scaling, on the compiled
kernels of this checkout and on foreach: a minute of one core. An environment is made for each version. ``--with PYTHON`` takes an
interpreter that has torch, pytest, numpy, click and rich already, as a Linux distribution's has. Rows go into docs/runs/torch_versions.json
and from there into docs/support.md. A torch for CUDA is never installed: its row says so.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tools.environments import ROOT, NotToBeHad, Torch, pinned

__all__ = ["BEGIN", "END", "main", "merged", "promised", "table", "with_table"]

Row = dict[str, Any]
RUNS = ROOT / "docs" / "runs" / "torch_versions.json"
PAGE = ROOT / "docs" / "support.md"
BEGIN, END = "<!-- versions: begin -->", "<!-- versions: end -->"
FILES = ("ops/test_against_reference.py", "optim/test_formula.py", "optim/test_checkpoint.py", "optim/test_amp.py")
# Run by the interpreter that is tested, in the root of the checkout.
_ASK = """
import json, platform, torch
from sam_kernels._dispatch import available
try:
    system = platform.freedesktop_os_release()["PRETTY_NAME"]
except OSError:
    system = platform.system()
print(json.dumps({
    "torch": torch.__version__, "python": platform.python_version(), "system": f"{system}, {platform.machine()}",
    "backends": [name for name in available("cpu") if name != "triton"],
}))
"""


def promised() -> list[str]:
    """Return the oldest torch of pyproject.toml and the one of constraints.txt."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = re.search(r'"torch>=([\d.]+)"', text)
    assert oldest is not None
    return [f"{oldest[1]}.0", pinned("torch")[0].partition("==")[2]]


def asked(python: Path) -> Row:
    """Return an interpreter's row before its tests: versions, system, backends. Raises click.ClickException without the package."""
    done = subprocess.run([python, "-c", _ASK], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode != 0:
        raise click.ClickException(f"{python} cannot import sam_kernels of this checkout:\n{done.stderr}")
    row: Row = json.loads(done.stdout)
    return row


def tested(python: Path, work: Path) -> Row:
    """Run the subset with an interpreter; return its row. The row is red where pytest reports no test at all."""
    row = asked(python)
    report = work / "report.xml"
    report.unlink(missing_ok=True)
    click.echo(f"torch {row['torch']}, Python {row['python']}, {row['system']}, backends {' and '.join(row['backends'])}")
    words = [str(python), "-m", "pytest", "-q", "-k", "not triton", f"--junitxml={report}", *(f"tests/{name}" for name in FILES)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    done = subprocess.run([*words, "-p", "no:cacheprovider"], cwd=ROOT, env=env)
    seconds = time.monotonic() - start
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    if report.exists():
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            counts = {name: count + int(suite.get(name, "0")) for name, count in counts.items()}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    is_green = done.returncode == 0 and passed > 0 and failed == 0
    return {**row, "status": "passed" if is_green else "failed", "passed": passed, "failed": failed, "seconds": round(seconds)}


def of_version(version: str, work: Path) -> Row:
    """Return the row of a torch from the package index, in an environment of its own."""
    try:
        environment = Torch(work / f"torch-{version}", version)
    except NotToBeHad as reason:
        return {"torch": version, "python": sys.version.split()[0], "status": "not run", "reason": str(reason)}
    environment.install(*pinned("pytest", "numpy", "click", "rich"))
    return tested(environment.python, work)


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Return rows in the order of versions. A new row replaces that of its torch and Python; "not run" is for a torch that ran nowhere."""

    def release(row: Row) -> str:
        return str(row["torch"]).partition("+")[0]

    rows = {(release(row), row["python"]): row for row in [*old, *new]}
    has_run = {release(row) for row in rows.values() if row["status"] != "not run"}
    kept = [row for row in rows.values() if row["status"] != "not run" or release(row) not in has_run]
    return sorted(kept, key=lambda row: ([int(part) for part in re.findall(r"\d+", release(row))], row["python"]))


def table(rows: Sequence[Row]) -> str:
    lines = ["| torch | Python | system | kernels | tests |", "|---|---|---|---|---|"]
    for row in rows:
        if row["status"] == "not run":
            lines.append(f"| {row['torch']} | {row['python']} | – | – | not run: {row['reason']} |")
            continue
        result = f"{row['passed']} passed" + (f", **{row['failed']} failed**" if row["status"] != "passed" else "")
        lines.append(f"| {row['torch']} | {row['python']} | {row['system']} | {', '.join(row['backends'])} | {result} |")
    return "\n".join(lines)


def with_table(page: str, rows: Sequence[Row]) -> str:
    """Return the page with the table between its markers. Raises click.ClickException for a page without one pair of them."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise click.ClickException(f"the page needs one line '{BEGIN}' and after it one line '{END}'")
    return f"{page[: page.index(BEGIN)]}{BEGIN}\n{table(rows)}\n{page[page.index(END) :]}"


@click.command()
@click.option(
    "--torch", "versions", multiple=True, help="Version of torch from the package index; may be repeated. Default: oldest, newest."
)
@click.option("--with", "pythons", multiple=True, type=click.Path(path_type=Path), help="Interpreter that has torch; may be repeated.")
@click.option("--store", is_flag=True, help="Write the rows into docs/runs/torch_versions.json and docs/support.md.")
def main(versions: tuple[str, ...], pythons: tuple[Path, ...], store: bool) -> None:
    """Run a subset of the tests with several versions of torch. Exits with 1 if a test fails."""
    work = ROOT / "build" / "versions"
    work.mkdir(parents=True, exist_ok=True)
    rows = [tested(python, work) for python in pythons]
    rows += [of_version(version, work) for version in versions or (() if pythons else promised())]
    click.echo(table(rows))
    if store:
        rows_before = json.loads(RUNS.read_text(encoding="utf-8")) if RUNS.exists() else []
        everything = merged(rows_before, rows)
        RUNS.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), everything), encoding="utf-8")
    if any(row["status"] == "failed" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
