"""``python -m bench.masters``: operations over 16-bit parameters with float32 masters, beside plain passes over as many bytes.

A list of masters, moments and momentum is float32, one of parameters and gradients bfloat16. The plain pass has the operation's bytes in
all and its mix of lists that are read, written, and both; its lists are of one length, since a plain pass knows no dtype. Take shapes that
outgrow the caches, as the default's do: the buffers are the same in every round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import click
import torch
from rich.table import Table
from torch import Tensor

import sam_kernels
from bench import floor, options
from bench.byte_model import Traffic, traffic_of
from bench.command import begin, write
from bench.environment import environment
from bench.op_calls import ADAMW, SGD, Lists, describe_once
from bench.ops import available_backends
from bench.timing import interleave, quantiles
from bench.workloads import WORKLOADS, Workload
from sam_kernels import functional as F
from sam_kernels.operations import AdamWStep, Perturb, Restore, SgdStep

__all__ = ["OPS", "main", "measure", "moved_bytes"]

_SIXTEEN = ("params", "grads")
_USES = ((1, "reads"), (2, "updates"), (1, "writes"))  # sweeps over a list that is used so

OPS: dict[str, tuple[Traffic, Callable[[Lists], object]]] = {
    "restore_": (
        traffic_of(Restore.accesses, "old_params", "params"),
        lambda b: F.restore_(b["params"], b["old_params"]),
    ),
    "perturb_": (
        traffic_of(partial(Perturb.accesses, from_old=True), "old_params", "grads", "params"),
        lambda b: F.perturb_(b["params"], b["grads"], b["old_params"], b["norm"][0], rho=1e-6, from_old=True),
    ),
    "sgd_step_": (
        traffic_of(partial(SgdStep.accesses, to_old=True), "old_params", "grads", "momentum_buffers", "params"),
        lambda b: F.sgd_step_(b["params"], b["grads"], b["momentum_buffers"], old_params=b["old_params"], to_old=True, **SGD),
    ),
    "adamw_step_": (
        traffic_of(partial(AdamWStep.accesses, to_old=True), "old_params", "grads", "exp_avgs", "exp_avg_sqs", "params"),
        lambda b: F.adamw_step_(
            b["params"], b["grads"], b["exp_avgs"], b["exp_avg_sqs"], b["state_steps"],
            old_params=b["old_params"], decoupled=True, to_old=True, **ADAMW,
        ),
    ),
}  # fmt: skip


def moved_bytes(op: str, numel: int) -> int:
    """Bytes that an operation reads and writes for ``numel`` elements."""
    traffic = OPS[op][0]
    return sum(sweeps * (2 if name in _SIXTEEN else 4) for sweeps, use in _USES for name in getattr(traffic, use)) * numel


def _lists(op: str, workload: Workload) -> Lists:
    """Positive everywhere: second moments must be."""

    def made(name: str) -> list[Tensor]:
        return [torch.rand(shape).to(torch.bfloat16 if name in _SIXTEEN else torch.float32) for shape in workload.shapes]

    lists = {name: made(name) for name in OPS[op][0].lists}
    return lists | {"norm": [torch.tensor(3.0)], "state_steps": [torch.tensor(1.0) for _ in workload.shapes]}


def measure(workload: Workload, op: str, backends: Sequence[str], rounds: int) -> dict[str, Any]:
    """Milliseconds of an operation on each backend and of the best plain pass, and what that is of each, in percent."""
    traffic, call = OPS[op]
    nbytes = moved_bytes(op, workload.numel)
    described = describe_once(_lists(op, workload))
    buffers = floor.flat_buffers(traffic, nbytes // traffic.passes)

    def run(backend: str) -> None:
        with sam_kernels.use_backend(backend):
            call(described)

    plain = {f"plain: {name}": partial(each, buffers) for name, each in floor.finalists(traffic, [buffers]).items()}
    samples = interleave({**{name: partial(run, name) for name in backends}, **plain}, rounds=rounds)
    found = {name: quantiles(each) for name, each in samples.items()}
    best = min((name for name in found if name in plain), key=lambda name: found[name].ms_50)
    return {
        "op": op,
        "workload": workload.name,
        "dtype": "bf16, fp32 masters",
        "bytes": nbytes,
        "ms": {name: [found[name].ms_20, found[name].ms_50, found[name].ms_80] for name in (*backends, best)},
        "pct_plain": {name: round(100 * found[best].ms_50 / found[name].ms_50, 1) for name in backends},
    }


@options.command
@options.names("--workload", "workloads", known=WORKLOADS, help="Shapes of parameters.", default=["gpt2_124m"])
@options.names("--ops", known=OPS, help="Operations.")
@click.option("--rounds", type=click.IntRange(min=2), default=20, show_default=True, help="Samples of each call.")
@options.threads()
@options.store("masters")
@options.JSON
def main(workloads: Sequence[str], ops: Sequence[str], rounds: int, threads: int | None, store: bool, json_path: Any) -> None:
    """Compare operations over bfloat16 parameters with float32 masters with plain passes over as many bytes."""
    console = begin(threads)
    backends = available_backends(lambda text: console.print(text, highlight=False))
    backends = [name for name in backends if name != "triton"]  # of a device
    table = Table("workload", "operation", "GB", *(f"{name}, ms" for name in backends), *(f"{name}, % of plain" for name in backends))
    rows = []
    for name in workloads:
        for op in ops:
            row = measure(WORKLOADS[name], op, backends, rounds)
            rows.append(row)
            medians = [f"{row['ms'][each][1]:.2f}" for each in backends]
            table.add_row(name, op, f"{row['bytes'] / 1e9:.2f}", *medians, *(f"{row['pct_plain'][each]:.0f}" for each in backends))
    console.print(table)
    write({**environment(), "gate": "skipped", "rows": rows}, json_path, "masters" if store else None)


if __name__ == "__main__":
    main()
