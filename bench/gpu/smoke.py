"""The first half minute on a device: every operation of every backend once against the float64 reference, one graph captured, one replay.

One process; every case is a row of JSON as soon as it has ended. A case that leaves the device unusable ends its backend: the process
starts anew with the next one. ``--dry-run``: on the CPU, with whatever stands in for the kernels.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch

from sam_kernels import SAM
from sam_kernels._dispatch import BACKENDS, reason_missing, select, use_backend
from sam_kernels.validation.backends import has_per_sample
from sam_kernels.validation.check import check
from sam_kernels.validation.options import OPTIONS, PER_SAMPLE_OPTIONS, SHARPNESS_OPTIONS

__all__ = ["cases", "main", "rows"]

ROOT = Path(__file__).resolve().parents[2]
DTYPE = "float32"
SIZES = {"centralize_": "slices"}  # the case of an operation whose means are over slices; of the others those of odd sizes
Case = Callable[[], str | None]  # what is wrong, None if nothing


def cases(backend: str, device: str) -> Iterator[tuple[str, str, Case]]:
    """(operation, keyword set, case); a graph last, as operation "graph"."""

    def of(op: str, case: str, option: str) -> Case:
        def run() -> str | None:
            worst = check(op, [backend], DTYPE, case, option, device=device)[backend]
            return None if worst.passed else str(worst)

        return run

    for op, options in OPTIONS.items():
        yield op, next(iter(options)), of(op, SIZES.get(op, "odd_sizes"), next(iter(options)))
    for op, options in SHARPNESS_OPTIONS.items():
        yield op, "plain", of(op, "odd", next(name for name in options if name.startswith("plain")))
    for op, options in PER_SAMPLE_OPTIONS.items() if has_per_sample(backend, device) else ():
        yield op, next(iter(options)), of(op, "odd", next(iter(options)))
    if device == "cuda" and backend != "foreach":  # which no graph is asked of
        yield "graph", "replay", lambda: _graph(backend)


def _optimizer(**options: Any) -> tuple[list[torch.nn.Parameter], Callable[[], None]]:
    """Parameters with gradients that stay, and a step."""
    generator = torch.Generator().manual_seed(5)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).cuda()) for shape in ((1000,), (33, 17), (3,))]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).cuda()
    optimizer = SAM(params, torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9, **options)

    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return params, step


def _graph(backend: str) -> str | None:
    """Two steps, a third captured and replayed, beside three eager ones."""
    with use_backend(backend):
        (params, step), (expected, eager_step) = _optimizer(capturable=True), _optimizer()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        for _ in range(3):
            eager_step()
    wrong = [i for i, (got, right) in enumerate(zip(params, expected, strict=True)) if not torch.equal(got, right)]
    return f"params[{wrong[0]}] after a replay is not that of eager steps" if wrong else None


def rows(backend: str, device: str) -> Iterator[dict[str, Any]]:
    """Rows of kind "test"."""
    for op, option, case in cases(backend, device):
        start = time.monotonic()
        try:
            wrong = case()
        except Exception as error:
            wrong = f"{type(error).__name__}: {str(error)[:200]}"
        row: dict[str, Any] = {"kind": "test", "name": f"smoke[{op}-{option}-{backend}]", "op": op, "backend": backend}
        row |= {"outcome": "failed" if wrong else "passed", "seconds": round(time.monotonic() - start, 2)}
        yield row | ({"words": wrong} if wrong else {})


def _is_usable(device: str) -> bool:
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("backends", nargs=-1, type=click.Choice(BACKENDS))
@click.option("--dry-run", is_flag=True, help="On the CPU.")
@click.option("--failed", is_flag=True, hidden=True, help="A backend before these has failed.")
def main(backends: tuple[str, ...], dry_run: bool, failed: bool) -> None:
    """Checks BACKENDS (default: all). The exit code is 1 if a case has failed."""
    device = "cpu" if dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("no CUDA device (--dry-run checks on the CPU)")
    backends = backends or BACKENDS
    for i, backend in enumerate(backends):
        if (reason := reason_missing(backend, device)) is not None:
            click.echo(f"left out: backend {backend}: {reason}")
            continue
        click.echo(f"{backend}: {_described(backend, device)}")
        for row in rows(backend, device):
            click.echo(json.dumps(row))
            if row["outcome"] == "failed":
                failed = True
                click.echo(f"{row['name']}: {row['words']}")
                if not _is_usable(device):
                    click.echo(f"the device is unusable after {row['name']}: the rest of {backend} is left out")
                    rest = [*backends[i + 1 :], "--failed"] if backends[i + 1 :] else None
                    if rest is None:
                        raise SystemExit(1)
                    sys.stdout.flush()
                    os.execv(sys.executable, [sys.executable, "-m", "bench.gpu.smoke", *rest])
    raise SystemExit(1 if failed else 0)


def _described(backend: str, device: str) -> str:
    with use_backend(backend):
        return select(device).describe()


if __name__ == "__main__":
    main(prog_name="python -m bench.gpu.smoke")
