"""The denominators of "percent of floor": the fastest plain pass with an operation's mix of reads and writes, found on this machine.

A weak denominator would flatter the kernels, so a small tournament (prefetch or not, static or dynamic chunks, streaming or ordinary
stores, torch's and numpy's own passes) finds three finalists; they are timed among the operation's providers, and the fastest is the floor.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from time import perf_counter_ns

import torch
from torch import Tensor

from bench.byte_model import Traffic
from bench.timing import interleave

__all__ = ["buffers_of_widths", "candidates", "candidates_of_widths", "compiler_version", "finalists", "flat_buffers", "library"]

Pass = Callable[[list[Tensor]], object]

PREFETCH, DYNAMIC, STREAM_WRITES, STREAM_UPDATES = 1, 2, 4, 8
FLAG_NAMES = {PREFETCH: "prefetch", DYNAMIC: "dynamic", STREAM_WRITES: "streaming", STREAM_UPDATES: "streaming updates"}
ALIGNMENT = 16  # floats in 64 bytes


def compiler_version() -> str | None:
    compiler = shutil.which("c++")
    if compiler is None:
        return None
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


@functools.cache
def library() -> ctypes.CDLL | str:
    """The compiled passes, or the reason they cannot be had. Loaded after torch, they run on torch's OpenMP threads."""
    compiler = shutil.which("c++")
    if compiler is None:
        return "no C++ compiler on PATH"
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "copy_floor.so"
        flags = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]
        command = [compiler, *flags, str(Path(__file__).with_name("copy_floor.cpp")), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            return f"{compiler} failed: {result.stderr.strip()[-300:]}"
        loaded = ctypes.CDLL(str(target))
    loaded.read_sum.restype = ctypes.c_float
    loaded.read_sum.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    for run in (loaded.mix_pass, loaded.widths_pass):
        run.restype = ctypes.c_int
        run.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 3, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    return loaded


def flat_buffers(traffic: Traffic, nbytes: int) -> list[Tensor]:
    """One contiguous buffer of ``nbytes``, rounded up to 64, for each list of the pass."""
    return [_flat_buffer(nbytes) for _ in traffic.lists]


def buffers_of_widths(traffic: Traffic, numel: int, narrow: Collection[str]) -> list[Tensor]:
    """As :func:`flat_buffers`, for :func:`candidates_of_widths`: ``numel`` elements of 2 bytes for a ``narrow`` list, of 4 for others."""
    nbytes = _flat_buffer(2 * numel).nbytes
    return [_flat_buffer(nbytes if name in narrow else 2 * nbytes) for name in _narrow_first(traffic, narrow)]


def _flat_buffer(nbytes: int) -> Tensor:
    return torch.full((-(-nbytes // (4 * ALIGNMENT)) * ALIGNMENT,), 0.5)


def _narrow_first(traffic: Traffic, narrow: Collection[str]) -> tuple[str, ...]:
    """The order in which ``widths_pass`` takes its lists."""
    return (*sorted(traffic.reads, key=lambda name: name not in narrow), *traffic.updates, *traffic.writes)


def candidates(traffic: Traffic) -> dict[str, Pass]:
    """Plain passes with this mix, by name, each taking the buffers of :func:`flat_buffers`."""
    if not traffic.writes and not traffic.updates:
        return {**_compiled_sums(), **_library_sums()}
    passes = _compiled_mixes(traffic)
    if not traffic.reads and not traffic.writes:
        passes["torch neg_"] = lambda buffers: [buffer.neg_() for buffer in buffers]
    elif traffic.passes == 2:
        passes["torch copy_"] = lambda buffers: buffers[1].copy_(buffers[0])
    elif not passes:
        # No compiler: the copy's bandwidth stands in, over as many bytes as the pass moves.
        half = traffic.passes / 2
        passes["torch copy_ (no compiler)"] = lambda buffers: _repeat_copy(buffers, half)
    return passes


def _repeat_copy(buffers: list[Tensor], times: float) -> None:
    for i in range(int(times)):
        buffers[(i + 1) % len(buffers)].copy_(buffers[i % len(buffers)])
    rest = int((times - int(times)) * buffers[0].numel())
    buffers[0][:rest].copy_(buffers[-1][:rest])


def _library_sums() -> dict[str, Pass]:
    """Of one buffer or two."""
    return {
        "torch.sum": lambda buffers: sum(buffer.sum() for buffer in buffers),
        "torch.dot": lambda buffers: torch.dot(buffers[0], buffers[-1]),
        "torch.linalg.vector_norm": lambda buffers: [torch.linalg.vector_norm(buffer) for buffer in buffers],
        "numpy.dot": lambda buffers: buffers[0].numpy().dot(buffers[-1].numpy()),
    }


def _label(kind: str, flags: int) -> str:
    return ", ".join([kind, *(name for flag, name in FLAG_NAMES.items() if flags & flag)])


def _compiled_sums() -> dict[str, Pass]:
    compiled = library()
    if isinstance(compiled, str):
        return {}

    def sum_with(flags: int) -> Pass:
        def read(buffer: Tensor) -> float:
            total: float = compiled.read_sum(buffer.data_ptr(), buffer.numel(), torch.get_num_threads(), flags)
            return total

        return lambda buffers: sum(map(read, buffers))

    return {_label("C++ sum", flags): sum_with(flags) for flags in (0, PREFETCH, DYNAMIC, PREFETCH | DYNAMIC)}


def _compiled_mixes(traffic: Traffic) -> dict[str, Pass]:
    compiled = library()
    if isinstance(compiled, str):
        return {}
    counts = len(traffic.reads), len(traffic.updates), len(traffic.writes)
    return _with_flags(compiled.mix_pass, counts, traffic)


def candidates_of_widths(traffic: Traffic, narrow: Collection[str]) -> dict[str, Pass]:
    """Plain passes over lists of 2 and of 4 bytes an element, each taking what :func:`buffers_of_widths` gives. The only list that is just
    written is a narrow one. None without a compiler."""
    compiled = library()
    if isinstance(compiled, str):
        return {}
    narrow_reads = sum(name in narrow for name in traffic.reads)
    counts = narrow_reads, len(traffic.reads) - narrow_reads, len(traffic.updates)
    return _with_flags(compiled.widths_pass, counts, traffic)


def _with_flags(mix: Callable[..., int], counts: tuple[int, int, int], traffic: Traffic) -> dict[str, Pass]:
    """A compiled pass over so many lists of each kind, with all the flags that change it."""

    def mix_with(flags: int) -> Pass:
        def run(buffers: list[Tensor]) -> None:
            pointers = (ctypes.c_void_p * len(buffers))(*(buffer.data_ptr() for buffer in buffers))
            if mix(pointers, *counts, buffers[-1].numel(), torch.get_num_threads(), flags):
                raise ValueError(f"copy_floor.cpp has no pass for {traffic}")

        return run

    writes, updates = (0, STREAM_WRITES) if traffic.writes else (0,), (0, STREAM_UPDATES) if traffic.updates else (0,)
    kind = "C++ pass" if traffic.updates else "C++ copy"
    return {_label(kind, sum(choice)): mix_with(sum(choice)) for choice in itertools.product((0, PREFETCH), (0, DYNAMIC), writes, updates)}


def finalists(
    passes: Mapping[str, Pass], sets: list[list[Tensor]], *, rounds: int = 4, count: int = 3, clock: Callable[[], int] = perf_counter_ns
) -> dict[str, Pass]:
    """The best of the candidates, each going through the sets of buffers in turn, ranked by their best sample.

    Several, because a short tournament on a busy machine does not always find the winner; the last word is with the measurement proper.
    """
    counter = itertools.count()
    calls = {name: functools.partial(lambda run: run(sets[next(counter) % len(sets)]), run) for name, run in passes.items()}
    samples = interleave(calls, rounds=rounds, warmup=1, clock=clock)
    return {name: passes[name] for name in sorted(samples, key=lambda name: min(samples[name]))[:count]}
