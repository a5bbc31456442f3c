"""``python -m bench.machine_code.instructions``: how many instructions a thread issues for each element in the main loops of sm_90.

Where they take longer than the bytes do, they decide how fast an operation is (:mod:`bench.gpu.limits`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

import click
import torch

from bench import op_calls
from bench.byte_model import OPS
from bench.machine_code import _ptx, _sass, cuda
from bench.machine_code.compiled import build
from bench.machine_code.launches import records_of
from bench.machine_code.targets import TARGETS
from bench.workloads import DTYPES
from sam_kernels.backends.triton._requirements import IS_INTERPRETED, REASON_MISSING

__all__ = ["ARCH", "SOURCES", "of_cuda", "of_kernels", "of_triton", "per_element"]

ARCH = "sm_90"
ELEMENTS = 1 << 16  # several blocks of every kernel
# The kernels of csrc/cuda that move an operation's bytes: source, and name where a source has several.
SOURCES = {
    "grad_norm": ("norm", "norm"),
    "direction_norm_": ("direction", "direction"),
    "grad_dots": ("grad_dots", "grad_dots"),
    "combine_": ("combine", "combine"),
    "perturb_": ("perturb", "perturb"),
    "random_perturb_": ("random", "random_normal"),
    "restore_": ("copy", "copy"),
    "sgd_step_": ("sgd", "sgd"),
    "adamw_step_": ("adamw", "adamw"),
}


def per_element(loops: Iterable[_sass.Loop], passes: int, itemsize: int) -> float | None:
    """Of the longest loop that accesses each operand of an operation equally often, 16 bytes at a time. None where there is none.

    Instructions of branches that are rarely taken count as if they were.
    """
    found = []
    for loop in loops:
        accesses = loop.loads[128] + loop.stores[128]
        if accesses and accesses % passes == 0:
            found.append(loop.instructions / (accesses // passes * 16 // itemsize))
    return max(found, default=None)


def of_cuda(op: str) -> dict[str, float | None]:
    """By type of storage."""
    source, name = SOURCES[op]
    return of_kernels(op, [kernel for kernel in cuda.compile_file(source, ARCH) if kernel.op == name])


def of_kernels(op: str, kernels: Iterable[cuda.Kernel]) -> dict[str, float | None]:
    """The same, of kernels that are compiled already: those of a small table, as the loops of both are alike."""
    small = {kernel.storage: kernel for kernel in kernels if kernel.table == 4096 and kernel.op == SOURCES[op][1] and kernel.arch == ARCH}
    return {name: per_element(small[name].loops, OPS[op].passes, dtype.itemsize) for name, dtype in DTYPES.items() if name in small}


def of_triton(op: str) -> dict[str, float | None]:
    """By type of storage, of the call that is timed."""
    return {name: _of_triton(op, dtype) for name, dtype in DTYPES.items()}


def _of_triton(op: str, dtype: torch.dtype) -> float | None:
    lists = op_calls.make_lists(op, ((ELEMENTS,),), dtype)
    found = []
    for variant in records_of(lambda: op_calls.ours(op, "triton")(lists)):
        if variant.walks_chunks:
            (code,) = (code for _, code in _sass.functions(_ptx.machine_code(build(variant, TARGETS[ARCH]).asm["cubin"])))
            found.append(per_element(_sass.loops(code), OPS[op].passes, dtype.itemsize))
    return found[0] if found else None


def _cells(counts: Mapping[str, float | None]) -> str:
    return " ".join(f"{'–' if (count := counts.get(name)) is None else f'{count:.1f}':>6}" for name in DTYPES)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("ops", nargs=-1, type=click.Choice(list(SOURCES)))
def main(ops: tuple[str, ...]) -> None:
    """Prints instructions an element of OPS (default: all), by nvcc and by Triton, for each type. A minute for all of them."""
    if REASON_MISSING is not None or IS_INTERPRETED:
        raise click.ClickException(REASON_MISSING or "TRITON_INTERPRET is set: nothing is compiled")
    if (reason := cuda.reason_missing()) is not None:
        raise click.ClickException(reason)
    click.echo(f"{'instructions an element':<24} native {' '.join(DTYPES)}, triton {' '.join(DTYPES)}")
    for op in ops or SOURCES:
        click.echo(f"{op:<24} {_cells(of_cuda(op))}  {_cells(of_triton(op))}")


if __name__ == "__main__":
    main(args=sys.argv[1:], prog_name="python -m bench.machine_code.instructions")
