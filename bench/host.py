"""``python -m bench.host``: what a whole step costs the host on its way to a device, measured without one.

Our Triton backend goes through Triton's launch path on :mod:`bench.offline`'s driver, our CUDA backend through the module compiled for the
host with its launches left out. Beside them, in turns in one process: torch's fused base optimizer, which takes one step of its own where
ours takes an ascent and a descent. Its tensors are the CPU's too, of four elements, so its kernels cost next to nothing.

Times are the calling thread's own on a processor, so that other processes of the machine do not count.

What is not in any of the figures: CUDA's own part of a launch and of a copy, two to four microseconds each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import thread_time_ns
from typing import Any

import click
import torch
from rich.table import Table
from torch import nn

import sam_kernels
from bench import options
from bench.command import begin, write
from bench.environment import environment
from bench.offline import compiling_only
from bench.providers import BASES, Base
from bench.providers.base import RHO
from bench.timing import interleave, quantiles
from sam_kernels._dispatch import reason_missing
from sam_kernels.backends.native import CUDA_ON_HOST

__all__ = ["BARS", "main", "measure"]

TORCH = "torch, fused base alone"
PROVIDERS = (TORCH, "triton", "native")
TENSORS = {"148": 148, "1000": 1000}  # GPT-2's, and more than the arguments of one launch hold
ELEMENTS = 4
BARS = {"native": 0.35, "triton": 0.8}  # of torch's fused AdamW step: 148 tensors, gradients that moved


@contextmanager
def launching_nothing() -> Iterator[None]:
    """While this is open neither backend runs a kernel. Raises click.ClickException where one of them is missing."""
    if (reason := reason_missing("native")) is not None:
        raise click.ClickException(f"backend native: {reason}; make install builds the CUDA kernels for the host")
    from sam_kernels import _cuda_on_host

    _cuda_on_host.set_runs_launches(False)
    try:
        with compiling_only(on_launch=_nothing):
            yield
    finally:
        _cuda_on_host.set_runs_launches(True)


def _nothing(launch: object) -> None:
    pass


def _parameters(count: int) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.ones(ELEMENTS)) for _ in range(count)]
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    return params


def _stepper(provider: str, params: Sequence[nn.Parameter], base: Base) -> Callable[[], object]:
    if provider == TORCH:
        return base.optimizer(params, **base.kwargs, fused=True).step
    optimizer: Any = sam_kernels.SAM(params, base.optimizer, rho=RHO, **base.kwargs)

    def step() -> None:
        with sam_kernels.use_backend(provider):
            optimizer.first_step()
            optimizer.second_step()

    return step


def _moved(params: Sequence[nn.Parameter]) -> Callable[[], None]:
    """New gradients where a backward pass would make them: at other addresses than the last, which are still taken."""
    kept: list[Any] = []

    def move() -> None:
        kept[:] = [param.grad for param in params]
        for param in params:
            param.grad = torch.full_like(param, 1e-3)

    return move


def measure(base: Base, count: int, *, moved: bool, rounds: int) -> dict[str, Any]:
    """Milliseconds of the host for a step of each, and their medians' ratio to torch's."""
    lists = {provider: _parameters(count) for provider in PROVIDERS}
    calls = {provider: _stepper(provider, lists[provider], base) for provider in PROVIDERS}
    before = {provider: _moved(lists[provider]) for provider in PROVIDERS} if moved else {}
    samples = interleave(calls, rounds=rounds, warmup=3, settle=0 if moved else 1, before=before, clock=thread_time_ns)
    found = {provider: quantiles(each) for provider, each in samples.items()}
    return {
        "base": base.name,
        "n_tensors": count,
        "gradients": "moved" if moved else "kept",
        "ms": {provider: [each.ms_20, each.ms_50, each.ms_80] for provider, each in found.items()},
        "of_torch": {provider: round(found[provider].ms_50 / found[TORCH].ms_50, 3) for provider in PROVIDERS},
    }


def bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line a bar: what was asked for, what was measured, pass or FAIL."""
    lines = []
    for provider, most in BARS.items():
        found = (row for row in rows if (row["base"], row["n_tensors"], row["gradients"]) == ("adamw", 148, "moved"))
        measured = next((row["of_torch"][provider] for row in found), None)
        verdict = "not measured" if measured is None else f"{measured:.2f}: {'pass' if measured <= most else 'FAIL'}"
        lines.append(f"{provider}: at most {most} of torch's fused AdamW step, 148 tensors, gradients moved: {verdict}")
    return lines


@options.command
@options.names("--tensors", known=TENSORS, help="How many.")
@options.names("--base", "bases", known=BASES, help="Wrapped optimizer.")
@click.option("--repeats", type=click.IntRange(min=2), default=200, show_default=True, help="Rounds.")
@options.store("host")
@options.JSON
def main(tensors: Sequence[str], bases: Sequence[str], repeats: int, store: bool, json_path: Path | None) -> None:
    """Compare the host's work for a step of SAM on its way to a device with that of torch's fused base optimizer."""
    if not CUDA_ON_HOST:  # decided when sam_kernels is imported
        command = [sys.executable, "-m", "bench.host", *sys.argv[1:]]
        raise SystemExit(subprocess.run(command, env={**os.environ, "SAM_KERNELS_CUDA_ON_HOST": "1"}, check=False).returncode)
    console = begin(1)
    table = Table("base", "tensors", "gradients", *(f"{provider}, ms" for provider in PROVIDERS), "triton / torch", "native / torch")
    rows = []
    with launching_nothing():
        for name in bases:
            for count in tensors:
                for moved in (False, True):
                    row = measure(BASES[name], TENSORS[count], moved=moved, rounds=repeats)
                    rows.append(row)
                    medians = [f"{row['ms'][provider][1]:.3f}" for provider in PROVIDERS]
                    ratios = [f"{row['of_torch'][provider]:.2f}" for provider in ("triton", "native")]
                    table.add_row(name, count, row["gradients"], *medians, *ratios)
    console.print(table)
    for line in bars(rows):
        console.print(line, highlight=False)
    write({**environment(), "gate": "skipped", "rows": rows}, json_path, "host" if store else None)


if __name__ == "__main__":
    main()
