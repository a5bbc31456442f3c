"""``python -m bench.quoted NAME ...``: run programs whose output a page quotes, and store it in docs/runs/NAME.json.

Without a name only README's table of claims is written anew, from the stored runs. ``tests/test_quoted.py`` compares all pages with them.
Accuracies are the same in every run on one machine; times need a machine that does nothing else.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from bench.environment import environment
from bench.options import command
from bench.page import ROOT, count, replace_between, table
from sam_kernels.cli.prove.command import CLAIMS

__all__ = ["BEGIN", "END", "PROGRAMS", "claims", "main"]

RUNS, README = ROOT / "docs" / "runs", ROOT / "README.md"
BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"
PROVED = {"prove_quick": "make demo", "prove": "python -m sam_kernels prove"}
Result = dict[str, Any]


def _run(arguments: Sequence[str], accepted: Sequence[int] = (0,), **variables: str) -> list[str]:
    """Run Python in the checkout and return the lines of its output. Raises click.ClickException where it fails."""
    found = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=found, capture_output=True, text=True)
    if done.returncode not in accepted:
        raise click.ClickException(f"python {' '.join(arguments)[:80]}: exit status {done.returncode}\n{done.stderr}")
    return done.stdout.splitlines()


def _quickstart() -> Result:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8"), re.DOTALL)
    return {"threads": 1, "output": _run(["-c", program], OMP_NUM_THREADS="1")}


def _language_model() -> Result:
    outputs = {seed: _run(["examples/rwsam_language_model.py", str(seed)]) for seed in (0, 1, 2)}
    return {"threads": 1, "output_by_seed": outputs}


def _prove(*options: str) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        _run(["-m", "sam_kernels", "prove", *options, "--out", folder], accepted=(0, 1))  # 1: a claim fails, which the result says
        found: Result = json.loads((Path(folder) / "prove.json").read_text(encoding="utf-8"))
    return {"claims": found["claims"]}


PROGRAMS: dict[str, Callable[[], Result]] = {
    "quickstart": _quickstart,
    "language_model": _language_model,
    "prove": _prove,
    "prove_quick": lambda: _prove("--quick"),
}


def claims(stored: dict[str, Result]) -> str:
    """Return README's table: each claim, its threshold, and what the stored runs of ``prove`` measured."""
    rows = []
    for claim in CLAIMS:
        cells = [claim.statement, claim.needed]
        for result in stored.values():
            (found,) = (each["measured"] for each in result["claims"] if each["name"] == claim.name)
            error = "" if not found or found["standard_error"] is None else f" ± {found['standard_error']:.2g}"
            cells.append(f"{found['effect']:.3g}{error}" if found else "–")
        rows.append(cells)
    shown = table(["claim", "threshold", *(f"`{PROVED[name]}`" for name in stored)], rows)
    where = [
        f"`{PROVED[name]}`: {found['seconds']:.0f} s on {found['cpu']}, {count(found['cores'], 'core')}, "
        f"load {found['load_1min']:g} when it began, commit {found['commit']}."
        for name, found in stored.items()
    ]
    return "\n\n".join([shown, " ".join(where)] if where else [shown])


def _stored() -> dict[str, Result]:
    paths = {name: RUNS / f"{name}.json" for name in PROVED}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


@command
@click.argument("names", nargs=-1, type=click.Choice(list(PROGRAMS)))
def main(names: tuple[str, ...]) -> None:
    """Runs programs whose output a page quotes, stores it in docs/runs, and writes README's table of claims."""
    for name in names:
        found, start = environment(), time.monotonic()
        if found["dirty"]:
            raise click.ClickException("not stored: sam_kernels, csrc or bench have changes that are not committed")
        found |= PROGRAMS[name]()
        found |= {"command": f"python -m bench.quoted {name}", "seconds": round(time.monotonic() - start, 1)}
        (RUNS / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        click.echo(f"docs/runs/{name}.json: {found['seconds']} s")
    page = README.read_text(encoding="utf-8")
    README.write_text(replace_between(page, claims(_stored()), README.name, BEGIN, END), encoding="utf-8")


if __name__ == "__main__":
    main(prog_name="python -m bench.quoted")
