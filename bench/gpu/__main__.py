"""``python -m bench.gpu``: operations and whole steps on the device, and how the kernels' work is best cut, stage by stage."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from bench import options
from bench.byte_model import OPS
from bench.gpu import bandwidth, gate, products, stages, sweep, sweep_products, training
from bench.gpu.device import device_name, gpu_environment
from bench.gpu.phases import xdist_options
from bench.gpu.record import BENCH, Record, row_of, writable
from bench.gpu.results import result_of
from bench.gpu.summary import bench_lines, verdict_lines
from bench.gpu.timing import DeviceClock, HostClock
from bench.gpu.workloads import GPU_WORKLOADS
from bench.workloads import DTYPES, Workload

RESULTS = Path(__file__).resolve().parents[1] / "results"
STAGES = [stage.name for stage in stages.STAGES]
MEASURED = [name for name in STAGES if name not in stages.SWEEPS]


@options.command
@click.option("--out", help="Folder for bench.jsonl; '-': rows go to standard output, and no tables. Default: bench/results/<device>.")
@click.option("--budget", default=120.0, show_default=True, help="Seconds; what does not fit is left out, and named.")
@click.option("--until", type=float, help="Unix time at which the budget ends, in place of --budget.")
@options.names("--stages", "stage_names", known=STAGES, default=MEASURED, help="In a fixed order.")
@options.names("--workload", known=GPU_WORKLOADS, help="Parameter shapes.")
@options.names("--dtype", known=DTYPES, help="Of everything an operation touches.")
@options.names("--ops", "op_names", known=OPS, help="'' for none.")
@click.option("--tests", multiple=True, type=click.File(), help="Rows of tests, '-' for standard input. Default: the tests are run first.")
@options.gate("Measure only what has passed its tests.")
@click.option("--dry-run", is_flag=True, help="On the CPU, with tiny inputs and a host clock: does the tool work?")
def main(
    out: str | None,
    budget: float,
    until: float | None,
    stage_names: list[str],
    workload: list[str],
    dtype: list[str],
    op_names: list[str],
    tests: tuple[Any, ...],
    with_gate: bool,
    dry_run: bool,
) -> None:
    """Measures on the device and writes a row of JSON for each measurement. Red tests, no numbers: operation by operation."""
    deadline = time.monotonic() + (budget if until is None else until - time.time())
    if device_name() is None and not dry_run:
        raise click.ClickException("no CUDA device (--dry-run goes through the motions on the CPU)")
    found = gpu_environment()
    keep, rows = _keeper(out, found["device"])
    checked = _gate([row for file in tests for line in file if (row := row_of(line))], bool(tests), with_gate, dry_run)
    click.echo(checked.line)
    keep({"kind": "run"} | found | {"quick": dry_run, "gate": checked.line})
    for row in _measured(checked, deadline, stage_names, workload, dtype, op_names, dry_run):
        keep(row)
    if out != "-":
        result = result_of(rows)
        swept = [*sweep.lines(result["rows"]), *sweep_products.lines(result["rows"])] if "sweep" in stage_names else []
        click.echo(
            "\n".join(
                [*bench_lines(result), *products.lines(result["rows"]), *training.lines(result["rows"]), *swept, *verdict_lines(result)]
            )
        )


def _measured(
    checked: gate.Gate, deadline: float, names: list[str], workload: list[str], dtype: list[str], op_names: list[str], dry_run: bool
) -> Iterator[dict[str, Any]]:
    clock, device = (HostClock(), "cpu") if dry_run else (DeviceClock(), "cuda")
    found = bandwidth.measure(clock, device, **({"nbytes": 1 << 20, "seconds": 0.05} if dry_run else {}))
    yield {"kind": "run", "bandwidth": found}
    chosen = {name: _shrunk(GPU_WORKLOADS[name]) if dry_run else GPU_WORKLOADS[name] for name in workload}
    run = stages.Run(clock, device, checked, deadline, chosen, dtype, op_names, found["copy"]["gbps"], click.echo)
    yield from stages.measure(run, names)


def _keeper(out: str | None, device: str) -> tuple[Callable[[dict[str, Any]], None], list[dict[str, Any]]]:
    """What takes a row, and where it goes."""
    if out == "-":
        return lambda row: click.echo(json.dumps(row)), []
    record = Record(writable(Path(out) if out else RESULTS / device, click.echo), click.echo)
    record.start([BENCH])
    return record.row, record.rows


def _gate(rows: list[dict[str, Any]], are_given: bool, with_gate: bool, dry_run: bool) -> gate.Gate:
    if not with_gate or dry_run:
        return gate.Gate("skipped", is_off=True)
    return gate.read(rows) if are_given else gate.run(xdist_options())


def _shrunk(workload: Workload) -> Workload:
    """The first tensors, no larger than a dry run can take."""
    shapes = tuple(tuple(min(size, 64) for size in shape) for shape in workload.shapes[:20])
    return Workload(workload.name, workload.title, shapes)


if __name__ == "__main__":
    main(args=sys.argv[1:], prog_name="python -m bench.gpu")
