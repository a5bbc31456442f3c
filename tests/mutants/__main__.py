"""``python -m tests.mutants``: plants faults, runs the tests that are to find each, and writes which test did, or that none did."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click

from tests.helpers.kept_objects import in_place_of_the_compiler
from tests.helpers.shared import FOLDER
from tests.mutants.planting import Mutant
from tests.mutants.selection import Run, chosen, runs_for

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.json")
LEFT_OUT = ("build", "dist", ".venv", ".git", "__pycache__", "*.egg-info", ".*_cache", ".benchmarks", "out", "results")
SECONDS = 600  # of a processor: a fault that makes a test run for ever is found
BUILDING = {"SAM_KERNELS_BUILD": "cpu", "SAM_KERNELS_INSTRUCTION_SETS": "baseline", "SAM_KERNELS_CXXFLAGS": "-O1"}
CPP = "csrc/"
NOTHING_RAN = 5  # pytest's exit status


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seed", default=1, show_default=True, help="Seed that chooses the faults.")
@click.option("--only", multiple=True, help="Plant only the faults in files whose path contains this, or another that is given.")
@click.option("--again", is_flag=True, help="Plant the faults again that the results have already.")
@click.option("--list", "listed", is_flag=True, help="Print the faults and plant none.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS, help="The file of results; rows are added to it.")
def main(seed: int, only: tuple[str, ...], again: bool, listed: bool, out: Path) -> None:
    """Plant faults in a copy of this checkout and run the tests on each.

    Exit with 1 if the items of `make test` miss a fault that those of `make test-full` find.
    """
    mutants = [mutant for mutant in chosen(ROOT, seed) if not only or any(each in mutant.path for each in only)]
    rows = {_key(row): row for row in json.loads(out.read_text(encoding="utf-8"))} if out.exists() else {}
    if listed:
        for mutant in mutants:
            click.echo(f"{mutant.path}:{mutant.line}: {mutant.kind}: {mutant.old!r} -> {mutant.new!r}")
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = shutil.copytree(ROOT, Path(folder) / "tree", ignore=shutil.ignore_patterns(*LEFT_OUT))
        if FOLDER.exists():
            shutil.copytree(FOLDER, tree / FOLDER.relative_to(ROOT))
        if any(mutant.path.startswith(CPP) for mutant in mutants):
            (Path(folder) / "bin").mkdir()
            BUILDING.update(in_place_of_the_compiler(Path(folder) / "bin"))
            _build(tree)
        left = [mutant for mutant in mutants if again or _key(asdict(mutant)) not in rows]
        for search in (_nearest, _others):  # what survives the quick tests of all files comes last
            survivors = []
            for mutant in left:
                if (outcome := _outcome(tree, mutant, search)) is None:
                    survivors.append(mutant)
                    continue
                row = {**asdict(mutant), **outcome}
                found_by = row["by"] or row["by_full"] or "nothing"
                click.echo(f"{mutant.path}:{mutant.line}: {mutant.old!r} -> {mutant.new!r}: {found_by}")
                rows[_key(row)] = row
                out.write_text(json.dumps(list(rows.values()), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            left = survivors
    found = [rows[_key(asdict(mutant))] for mutant in mutants]
    lost = [row for row in found if row["by"] is None and row["by_full"] is not None]
    killed = sum(row["by"] is not None for row in found)
    click.echo(f"{len(found)} faults: {killed} found by make test, {killed + len(lost)} by make test-full")
    sys.exit(bool(lost))


def _key(row: dict[str, object]) -> tuple[object, ...]:
    return row["path"], row["start"], row["old"], row["new"]


Outcome = dict[str, str | None]


def _outcome(tree: Path, mutant: Mutant, search: Callable[[Path, tuple[Run, ...]], Outcome | None]) -> Outcome | None:
    """What a search finds while the fault is in the tree."""
    path = tree / mutant.path
    source = path.read_bytes()
    path.write_bytes(mutant.plant(source))
    try:
        if mutant.path.startswith(CPP) and not _build(tree, succeeds=False):
            return {"by": "the compiler", "by_full": "the compiler"}
        return search(tree, runs_for(mutant.path))
    finally:
        path.write_bytes(source)


def _nearest(tree: Path, runs: tuple[Run, ...]) -> Outcome | None:
    """The test that fails first among the nearest."""
    failed = _failure(tree, runs[0])
    return None if failed is None else {"by": failed, "by_full": failed}


def _others(tree: Path, runs: tuple[Run, ...]) -> Outcome:
    """The test that fails first of `make test`; if none does, of `make test-full`, whose items include those of `make test`."""
    for run in runs[1:]:
        if (failed := _failure(tree, run)) is not None:
            return {"by": failed, "by_full": failed}
    return {"by": None, "by_full": next((failed for run in runs if (failed := _failure(tree, run, "--beyond-pairs")) is not None), None)}


def _failure(tree: Path, run: Run, *options: str) -> str | None:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options, *run.arguments]
    done = _call(command, tree, run.environment)
    if done.returncode in (0, NOTHING_RAN):
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+(?:\[.*?\])?)(?: - |$)", done.stdout, re.MULTILINE)
    return failed[1] if failed else f"exit status {done.returncode} of {' '.join(run.arguments)}"


def _build(tree: Path, *, succeeds: bool = True) -> bool:
    """The CPU's module for the baseline alone, hardly optimised: a minute. What the fault before changed is taken from the objects kept."""
    done = _call([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], tree, BUILDING)
    if succeeds and done.returncode != 0:
        raise click.ClickException(done.stdout)
    return done.returncode == 0


def _call(command: list[str], tree: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS)),
    )  # fmt: skip


if __name__ == "__main__":
    main(prog_name="python -m tests.mutants")
