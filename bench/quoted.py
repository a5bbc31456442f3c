"""``python -m bench.quoted NAME ...``: run programs whose output a page quotes, and store it in docs/runs/NAME.json.

``tests/test_quoted.py`` compares the pages with the stored runs. The accuracies of a program are the same in every run on one machine; the
seconds want a machine that does nothing else.
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
from bench.page import ROOT

__all__ = ["PROGRAMS", "main"]

RUNS = ROOT / "docs" / "runs"
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


@command
@click.argument("names", nargs=-1, required=True, type=click.Choice(list(PROGRAMS)))
def main(names: tuple[str, ...]) -> None:
    """Runs programs whose output a page quotes and stores it in docs/runs."""
    for name in names:
        found, start = environment(), time.monotonic()
        if found["dirty"]:
            raise click.ClickException("not stored: sam_kernels, csrc or bench have changes that are not committed")
        found |= PROGRAMS[name]()
        found |= {"command": f"python -m bench.quoted {name}", "seconds": round(time.monotonic() - start, 1)}
        (RUNS / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        click.echo(f"docs/runs/{name}.json: {found['seconds']} s")


if __name__ == "__main__":
    main(prog_name="python -m bench.quoted")
