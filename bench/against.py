"""``python -m bench.against COMMIT``: whole steps of this checkout against those of another commit, in turns in one process.

The other commit's package is imported under a name of its own. Where ``csrc`` differs its CPU module is compiled first; otherwise it has
the modules of this checkout. A second copy of the other commit takes part as a control: its ratio to the first shows what the machine
cannot tell apart.
"""

from __future__ import annotations

import importlib
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
from rich.table import Table

import sam_kernels
from bench import gate, options
from bench.command import begin, new_result, write
from bench.providers import BASES, Base
from bench.providers.base import RHO
from bench.steps import COMBINATIONS
from bench.timing import interleave
from bench.workloads import DTYPES, WORKLOADS, Workload, make_grads, make_params

__all__ = ["extract", "load", "main", "measure"]

ROOT = Path(__file__).parents[1]
ROUNDS = {"many_tiny": 60, "resnet18": 40, "gpt2_124m": 15}


def extract(commit: str, folder: Path) -> Path:
    """The checkout of ``commit`` in a new folder, with compiled modules: its own where its sources are others than those here."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    if subprocess.run(["git", "diff", "--quiet", commit, "--", "csrc", "setup.py"], cwd=ROOT, check=False).returncode:
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        subprocess.run(command, cwd=folder, env={**os.environ, "SAM_KERNELS_BUILD": "cpu"}, check=True, stdout=subprocess.DEVNULL)
    else:
        for compiled in (ROOT / "sam_kernels").glob("*.so"):
            shutil.copy2(compiled, folder / "sam_kernels")
    return folder


def load(checkout: Path, name: str) -> ModuleType:
    """The package of a checkout as a module called ``name``."""
    package = checkout.parent / "packages" / name
    shutil.copytree(checkout / "sam_kernels", package)
    for path in package.rglob("*.py"):
        path.write_text(re.sub(r"\bsam_kernels\b", name, path.read_text(encoding="utf-8")), encoding="utf-8")
    sys.path.insert(0, str(package.parent))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(package.parent))


def _stepper(module: Any, workload: Workload, base: Base, dtype: str) -> Callable[[], None]:
    params = make_params(make_grads(workload.shapes, DTYPES[dtype]))
    optimizer = module.SAM(params, base.optimizer, rho=RHO, **base.kwargs | {"lr": 1e-6})

    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return step


def measure(modules: dict[str, Any], workload: Workload, base: Base, dtype: str, *, rounds: int, times: int) -> dict[str, Any]:
    """Medians in milliseconds, and 20, 50 and 80 % quantiles of the ratios, round by round, to the first module.

    ``times``: how often the optimizers are made anew, because where their tensors happen to lie in memory moves a step by some percent.
    """
    samples: dict[str, list[float]] = {name: [] for name in modules}
    for turn in range(times):
        names = list(modules)[turn % len(modules) :] + list(modules)[: turn % len(modules)]
        steps = {name: _stepper(modules[name], workload, base, dtype) for name in names}
        for name, found in interleave(steps, rounds=rounds, settle=1 if workload.name == "many_tiny" else 0).items():
            samples[name] += found
    first = np.array(samples[next(iter(modules))])
    ratios = {name: np.quantile(np.array(each) / first, (0.2, 0.5, 0.8)).round(4).tolist() for name, each in samples.items()}
    return {
        "workload": workload.name,
        "base": base.name,
        "dtype": dtype,
        "ms": {name: float(np.median(each)) for name, each in samples.items()},
        "ratios": ratios,
    }


@options.command
@click.argument("commit")
@options.names("--workloads", known=WORKLOADS, help="Parameter shapes.")
@options.names("--bases", known=BASES, help="Wrapped optimizers.")
@options.names("--dtypes", known=DTYPES, default=("fp32",), help="Types of parameters, gradients and state.")
@click.option("--repeats", type=click.IntRange(min=1), help="Rounds per set of optimizers. Default: 15 to 60, by size.")
@click.option("--times", type=click.IntRange(min=1), default=4, show_default=True, help="Sets of optimizers, made one after another.")
@options.threads("Threads of torch. Default: all cores.")
@options.gate()
@options.store("against")
@options.JSON
def main(
    commit: str,
    workloads: Sequence[str],
    bases: Sequence[str],
    dtypes: Sequence[str],
    repeats: int | None,
    times: int,
    threads: int | None,
    with_gate: bool,
    store: bool,
    json_path: Path | None,
) -> None:
    """Compare whole optimizer steps of this checkout with those of COMMIT."""
    console = begin(threads)
    result = new_result(with_gate, gate.TESTS) | {"against": commit, "command": " ".join(["python", *sys.orig_argv[1:]])}
    table = Table("workload", "base", "dtype", "ms before", "ms now", "now / before: 20, 50, 80 %", "control / before")
    with tempfile.TemporaryDirectory() as folder:
        names = ("sam_kernels_before", "sam_kernels_control")
        checkout = extract(commit, Path(folder) / "checkout")
        modules: dict[str, Any] = {name.rpartition("_")[2]: load(checkout, name) for name in names} | {"now": sam_kernels}
        for workload, (base, dtype) in itertools.product(workloads, COMBINATIONS):
            if base not in bases or dtype not in dtypes:
                continue
            row = measure(modules, WORKLOADS[workload], BASES[base], dtype, rounds=repeats or ROUNDS[workload], times=times)
            result["rows"].append(row)
            shown = {name: " ".join(f"{each:.3f}" for each in found) for name, found in row["ratios"].items()}
            table.add_row(workload, base, dtype, f"{row['ms']['before']:.3f}", f"{row['ms']['now']:.3f}", shown["now"], shown["control"])
    console.print(table)
    write(result, json_path, "against" if store else None)


if __name__ == "__main__":
    main()
