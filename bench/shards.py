"""``python -m bench.shards``: a step over DTensors beside the same step over ordinary tensors, on one and two processes.

Parameters are those of GPT-2 by number, with so few elements that kernels cost next to nothing: what is compared is the host's time for a
step, on the calling thread's own processor. SAM takes an ascent and a descent; torch's optimizer takes one step of its own. Gradients are
made anew before every step, as FSDP2 makes them.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import thread_time_ns
from typing import Any

import click
import torch
from rich.table import Table
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.spawn import start_processes

import sam_kernels
from bench import options
from bench.command import begin, write
from bench.environment import environment
from bench.providers import BASES
from bench.providers.base import RHO
from bench.providers.davda54 import PublishedSAM
from bench.timing import interleave, quantiles

TENSORS, ROWS, COLUMNS = 148, 4, 4  # rows: of one rank
PLAIN, SHARDED, TORCH, LOOP = "SAM, ordinary tensors", "SAM, DTensors", "torch's fused AdamW, DTensors", "davda54 loop, DTensors"
REDUCES = "its all-reduces alone"
BARS = {PLAIN: 1.3, TORCH: 0.8}  # SAM over DTensors, of each


def _parameters(mesh: Any) -> list[nn.Parameter]:
    local = [torch.ones(ROWS, COLUMNS) for _ in range(TENSORS)]
    made = [each if mesh is None else DTensor.from_local(each, mesh, [Shard(0)], run_check=False) for each in local]
    return [nn.Parameter(each) for each in made]


def _new_gradients(params: Sequence[nn.Parameter]) -> Callable[[], None]:
    """As a backward pass leaves them: at other addresses than the last."""

    def make() -> None:
        for param in params:
            local = torch.full((ROWS, COLUMNS), 1e-3)
            param.grad = DTensor(local, param._spec, requires_grad=False) if isinstance(param, DTensor) else local

    return make


def _stepper(name: str, params: Sequence[nn.Parameter]) -> Callable[[], object]:
    base = BASES["adamw"]
    if name == TORCH:
        return base.optimizer(params, **base.kwargs, fused=True).step
    make: Any = PublishedSAM if name == LOOP else sam_kernels.SAM
    optimizer = make(params, base.optimizer, rho=RHO, **base.kwargs, fused=True)

    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return step


@contextmanager
def counted() -> Iterator[list[Tensor]]:
    """A tensor of zeros like that of every all-reduce that is called."""
    found: list[Tensor] = []
    usual = distributed.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(torch.zeros_like(tensor))
        return usual(tensor, *args, **kwargs)

    distributed.all_reduce = all_reduce
    try:
        yield found
    finally:
        distributed.all_reduce = usual


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """A row for this number of ranks; on every rank alike."""
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    lists = {name: _parameters(None if name == PLAIN else mesh) for name in (PLAIN, SHARDED, TORCH, LOOP)}
    before = {name: _new_gradients(params) for name, params in lists.items()}
    for make in before.values():
        make()
    calls = {name: _stepper(name, params) for name, params in lists.items()}
    with counted() as collectives:
        calls[SHARDED]()
    if collectives:
        calls[REDUCES] = lambda: [distributed.all_reduce(each) for each in collectives]
    samples = interleave(calls, rounds=rounds, warmup=3, before=before, clock=thread_time_ns)
    found = {name: quantiles(each) for name, each in samples.items()}
    gc.collect()
    objects = len(gc.get_objects())
    for _ in range(steps):
        before[SHARDED]()
        calls[SHARDED]()
    gc.collect()
    return {
        "ranks": distributed.get_world_size(),
        "ms": {name: [each.ms_20, each.ms_50, each.ms_80] for name, each in found.items()},
        "of": {name: round(found[SHARDED].ms_50 / found[name].ms_50, 3) for name in lists},
        "collectives": [each.nbytes for each in collectives],
        "steps": steps,
        "objects_more": len(gc.get_objects()) - objects,
    }


def _on_rank(rank: int, ranks: int, folder: str, rounds: int, steps: int) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store-{ranks}", rank=rank, world_size=ranks)
    row = measure(rounds, steps)
    if rank == 0:
        torch.save(row, Path(folder) / f"{ranks}.pt")
    distributed.destroy_process_group()


@options.command
@click.option("--repeats", type=click.IntRange(min=2), default=200, show_default=True, help="Rounds.")
@click.option("--steps", type=click.IntRange(min=1), default=10_000, show_default=True, help="Steps over which objects are counted.")
@options.store("shards")
@options.JSON
def main(repeats: int, steps: int, store: bool, json_path: Path | None) -> None:
    """Compare the host's work for a step of SAM over DTensors with that over ordinary tensors, and with torch's."""
    console = begin(1)
    names = (PLAIN, SHARDED, REDUCES, TORCH, LOOP)
    table = Table("ranks", *(f"{name}, ms" for name in names), "all-reduces, bytes", f"objects after {steps} steps")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            start_processes(_on_rank, (ranks, folder, repeats, steps), nprocs=ranks, start_method="spawn")
            row = torch.load(Path(folder) / f"{ranks}.pt", weights_only=False)
            rows.append(row)
            medians = [f"{row['ms'][name][1]:.3f}" if name in row["ms"] else "none" for name in names]
            table.add_row(str(ranks), *medians, ", ".join(map(str, row["collectives"])) or "none", f"{row['objects_more']:+d}")
    console.print(table)
    for row in rows:
        for name, most in BARS.items():
            verdict = "pass" if row["of"][name] <= most else "FAIL"
            console.print(f"{row['ranks']} ranks: at most {most} of {name}: {row['of'][name]:.2f}: {verdict}", highlight=False)
        if REDUCES in row["ms"]:
            rest = (row["ms"][SHARDED][1] - row["ms"][REDUCES][1]) / row["ms"][PLAIN][1]
            console.print(f"{row['ranks']} ranks: without {REDUCES}: {rest:.2f} of {PLAIN}", highlight=False)
    command = " ".join(["python -m bench.shards", *sys.argv[1:]])
    write({**environment(), "gate": "skipped", "command": command, "rows": rows}, json_path, "shards" if store else None)


if __name__ == "__main__":
    main()
