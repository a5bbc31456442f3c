"""``python -m bench.gpu``: operations and whole steps on the device; ``--sweep``: how the kernels' work is best cut."""

from __future__ import annotations

import gc
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from bench.byte_model import OPS
from bench.gpu import bandwidth, dispatch, gate, ops, products, steps, sweep, sweep_products, training
from bench.gpu.device import device_name, gpu_environment
from bench.gpu.phases import xdist_options
from bench.gpu.summary import bench_lines, verdict_lines
from bench.gpu.timing import Clock, DeviceClock, HostClock
from bench.gpu.workloads import GPU_WORKLOADS
from bench.workloads import DTYPES, Workload

RESULTS = Path(__file__).resolve().parents[1] / "results"
SMALL = 1_000_000  # elements of a dry run's workloads at most
PRODUCTS_SECONDS = 25  # of a sweep
PRODUCTS_SHARE = 0.4  # of a benchmark's time, at most
ROOM = 0.92  # of the device's free memory


def _names(known: Any) -> Any:
    def parse(ctx: click.Context, param: click.Parameter, value: str) -> list[str]:
        names = [name for name in value.split(",") if name]
        if unknown := [name for name in names if name not in known]:
            raise click.BadParameter(f"unknown: {', '.join(unknown)}; the names are {', '.join(known)}")
        return names

    return parse


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder. Default: bench/results/<device>.")
@click.option("--budget", default=120.0, show_default=True, help="Seconds; what does not fit is left out, and named.")
@click.option("--workload", default=",".join(GPU_WORKLOADS), callback=_names(GPU_WORKLOADS), show_default=True, help="Parameter shapes.")
@click.option("--dtype", default=",".join(DTYPES), callback=_names(DTYPES), show_default=True, help="Of everything an operation touches.")
@click.option("--ops", "op_names", default=",".join(OPS), callback=_names(OPS), show_default=True, help="'' for none.")
@click.option("--steps/--no-steps", "with_steps", default=True, help="Whole steps.")
@click.option("--products/--no-products", "with_products", default=True, help="Gradient norms per sample.")
@click.option("--training/--no-training", "with_training", default=True, help="Whole training steps, forward and backward passes included.")
@click.option("--tests", multiple=True, type=click.Path(dir_okay=False, path_type=Path), help="JUnit files of this run. Default: run them.")
@click.option("--gate/--no-gate", "with_gate", default=True, help="Measure only what has passed its tests.")
@click.option("--sweep", "with_sweep", is_flag=True, help="Sizes of chunks and blocks and warps instead, for every kernel.")
@click.option("--dry-run", is_flag=True, help="On the CPU, with tiny inputs and a host clock: does the tool work?")
def main(
    out: Path | None,
    budget: float,
    workload: list[str],
    dtype: list[str],
    op_names: list[str],
    with_steps: bool,
    with_products: bool,
    with_training: bool,
    tests: tuple[Path, ...],
    with_gate: bool,
    with_sweep: bool,
    dry_run: bool,
) -> None:
    """Measures on the device and writes one JSON file. Red tests, no numbers: operation by operation."""
    deadline = time.monotonic() + budget
    if device_name() is None and not dry_run:
        raise click.ClickException("no CUDA device (--dry-run goes through the motions on the CPU)")
    found = gpu_environment()
    out = out or RESULTS / found["device"]
    out.mkdir(parents=True, exist_ok=True)
    checked = _gate(tests, with_gate, dry_run)
    click.echo(checked.line)
    found |= {"quick": dry_run, "gate": checked.line}
    clock, device = (HostClock(), "cpu") if dry_run else (DeviceClock(), "cuda")
    if with_sweep:
        found["rows"] = []
        elements = sweep.run(clock, device, checked, deadline - PRODUCTS_SECONDS, dtypes=dtype)
        for row in itertools.chain(elements, sweep_products.run(clock, device, checked, deadline) if with_products else ()):
            found["rows"].append(row)
            _write(out / "sweep.json", found)
        click.echo("\n".join([*sweep.lines(found["rows"]), *sweep_products.lines(found["rows"])]))
        return
    found["bandwidth"] = bandwidth.measure(clock, device, **({"nbytes": 1 << 20, "seconds": 0.05} if dry_run else {}))
    found["rows"] = []
    chosen = [_shrunk(GPU_WORKLOADS[name]) if dry_run else GPU_WORKLOADS[name] for name in workload]
    try:
        copy_gbps = found["bandwidth"]["copy"]["gbps"]
        elements = _rows(chosen, dtype, op_names, with_steps, checked, clock, device, copy_gbps, deadline)
        # Products first, for a share of the time; the others go on until it is over.
        until = time.monotonic() + PRODUCTS_SHARE * budget
        of_products = products.measure(clock, device, checked, until, dtypes=dtype, say=click.echo) if with_products else iter(())
        of_training = training.measure(clock, device, checked, deadline, copy_gbps=copy_gbps, say=click.echo) if with_training else iter(())
        for row in itertools.chain(of_products, of_training, elements):
            found["rows"].append(row)
            _write(out / "default.json", found)  # after every row: a run that is cut off keeps what it measured
    finally:
        found["rows"] += dispatch.rows(found["rows"])
        _write(out / "default.json", found)
    click.echo("\n".join([*bench_lines(found), *products.lines(found["rows"]), *training.lines(found["rows"]), *verdict_lines(found)]))


def _gate(tests: Sequence[Path], with_gate: bool, dry_run: bool) -> gate.Gate:
    if not with_gate or dry_run:
        return gate.Gate("skipped", is_off=True)
    if tests:
        return gate.read(tests)
    with tempfile.TemporaryDirectory() as folder:
        return gate.run(Path(folder) / "tests.xml", xdist_options())


def _write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n")


def _shrunk(workload: Workload) -> Workload:
    """The first tensors, no larger than a dry run can take."""
    shapes = tuple(tuple(min(size, 64) for size in shape) for shape in workload.shapes[:20])
    return Workload(workload.name, workload.title, shapes)


def _fits(nbytes: int, what: str, device: str) -> bool:
    if device == "cpu":
        return True
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] * ROOM
    if nbytes > free:
        click.echo(f"left out: {what}: needs {nbytes / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} GiB can be had")
    return nbytes <= free


def _guarded(rows: Iterator[dict[str, Any]], what: str) -> Iterator[dict[str, Any]]:
    """What goes wrong with one case must not take the others along."""
    try:
        yield from rows
    except Exception as error:
        click.echo(f"left out: {what}: {type(error).__name__}: {str(error)[:300]}")


def _rows(
    workloads: list[Workload],
    dtypes: list[str],
    op_names: list[str],
    with_steps: bool,
    checked: gate.Gate,
    clock: Clock,
    device: str,
    copy_gbps: float,
    deadline: float,
) -> Iterator[dict[str, Any]]:
    """The most telling first, whoever runs out of time has those: operations on tensors that no cache holds, whole steps, the rest."""
    seconds = 0.02 if device == "cpu" else 0.25
    common: dict[str, Any] = {"clock": clock, "device": device, "copy_gbps": copy_gbps, "seconds": seconds, "say": click.echo}
    backends = ops.backends_on(device, click.echo)
    for refused in checked.refused(op_names, backends):
        click.echo(f"left out: {refused}: no green test")

    def of_ops(workload: Workload) -> Iterator[dict[str, Any]]:
        for dtype, op in itertools.product(dtypes, op_names):
            what = f"{op} {workload.name} {dtype}"
            if time.monotonic() > deadline:
                click.echo(f"left out: {what}: out of time")
            elif _fits(ops.memory_needed(op, workload, dtype), what, device):
                mine = [backend for backend in backends if checked.allows(op, backend)]
                yield from _guarded(ops.measure(workload, op, dtype, mine, **common), what)

    def of_steps(workload: Workload, base: str, dtype: str) -> Iterator[dict[str, Any]]:
        what = f"steps of {base} {workload.name} {dtype}"
        mine = steps.allowed(checked, base, device)
        if dtype not in dtypes or not mine:
            click.echo(f"left out: {what}: {'not asked for' if dtype not in dtypes else 'no green test of one of its operations'}")
        elif time.monotonic() > deadline:
            click.echo(f"left out: {what}: out of time")
        else:
            together = _fits(steps.memory_needed(workload, base, dtype, mine), f"{what}, all at a time", device)
            for few in [mine] if together else [[backend] for backend in mine]:
                alone = f"{what} on {' and '.join(few)}"
                if together or _fits(steps.memory_needed(workload, base, dtype, few), alone, device):
                    yield from _guarded(steps.measure(workload, base, dtype, few, **common), alone)

    yield from of_ops(workloads[0])
    for workload in workloads if with_steps else ():
        for base, dtype in steps.COMBINATIONS:
            yield from of_steps(workload, base, dtype)
    for workload in workloads[1:]:
        yield from of_ops(workload)


if __name__ == "__main__":
    main(args=sys.argv[1:], prog_name="python -m bench.gpu")
