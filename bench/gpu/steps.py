"""Whole steps on the device, without forward and backward: ours on each backend, launched and replayed from a CUDA graph, the published
loop, and their peers (:mod:`bench.gpu.peers`)."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.byte_model import STEP_OPS, op_bytes, step_bytes
from bench.gpu import launches, peers
from bench.gpu.gate import Gate
from bench.gpu.ops import speed
from bench.gpu.peers import BASE_ALONE, LOOPS
from bench.gpu.timing import Call, Clock, interleave, launch_us, wall_ms
from bench.providers import BASES, RHO, Base, Stepper
from bench.providers.ours import OnBackend
from bench.workloads import DTYPES, Workload, make_grads, make_params
from sam_kernels import SAM
from sam_kernels._dispatch import reason_missing

__all__ = ["BACKENDS", "BASE_ALONE", "COMBINATIONS", "FORWARDS", "LOOPS", "allowed", "graph_of", "measure", "memory_needed", "provider"]

COMBINATIONS = (("sgd", "fp32"), ("adamw", "fp32"), ("adamw", "bf16"))
BACKENDS = ("native", "triton")  # those with kernels of their own for a device
WALL_ROUNDS, LAUNCH_ROUNDS = 5, 30
FORWARDS = "sam_kernels/native, forwards"  # its passes do not begin where the last one ended, in the second-level cache


def provider(backend: str) -> str:
    return f"sam_kernels/{backend}"


def graph_of(backend: str) -> str:
    """The same, capturable, its step recorded once."""
    return f"{provider(backend)}, graph"


def allowed(gate: Gate, base: str, device: str) -> list[str]:
    """The backends on which every operation of our step has passed its tests. A dry run goes through the motions of both."""
    if device == "cpu":
        return list(BACKENDS)
    there = [backend for backend in BACKENDS if reason_missing(backend, torch.device(device).type) is None]
    return [backend for backend in there if all(gate.allows(op, backend) for op in STEP_OPS[base])]


def _is_about_launching(workload: Workload) -> bool:
    """One tensor takes as many launches as the operations have: of graphs, and of peers that launch, there is nothing to learn."""
    return workload.n_tensors > 1


def memory_needed(workload: Workload, base: str, dtype_name: str, backends: Sequence[str]) -> int:
    """Bytes: parameters, backups and state of each optimizer, the gradients they share, copies, and a loop's temporaries."""
    states = sum(key != "step" for key in BASES[base].state_keys)
    optimizers, copies = len(LOOPS) + len(backends), 0  # of one tensor the peers come later, and take less
    if _is_about_launching(workload):
        optimizers += len(backends) + 1 + len(peers.ON_DTENSORS) + len(peers.OTHERS)
        copies = 2 * (3 + states)
    return workload.numel * DTYPES[dtype_name].itemsize * (optimizers * (2 + states) + copies + 1 + 4)


def _kwargs(base: Base, device: str) -> dict[str, Any]:
    """AdamW's counters lie on the device where it is fused, as a user of one would have them. A dry run takes what the CPU has."""
    return {**base.kwargs, **({"fused": True} if "step" in base.state_keys and device != "cpu" else {})}


def _ours(params: Sequence[torch.nn.Parameter], base: Base, device: str, backend: str, *, capturable: bool = False) -> Stepper:
    optimizer = SAM(params, base.optimizer, rho=RHO, capturable=capturable, **_kwargs(base, device))
    return OnBackend(optimizer, backend if reason_missing(backend, torch.device(device).type) is None else "foreach")


def _call(stepper: Stepper) -> Call:
    def run() -> None:
        stepper.first_step()
        stepper.second_step()

    return run


def _ready(call: Call) -> Call:
    """After two calls, in which state, tables and pinned memory are made."""
    for _ in range(2):
        call()
    return call


def _replay(params: Sequence[torch.nn.Parameter], base: Base, device: str, backend: str) -> Call:
    """A replay of one step, recorded after warm-up on a side stream."""
    call = _call(_ours(params, base, device, backend, capturable=True))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _ready(call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _forwards(call: Call) -> Call:
    set_cut: Callable[..., None] = importlib.import_module("sam_kernels.backends.native.cuda")._cuda.set_cut

    def run() -> None:
        set_cut(backwards=False)
        try:
            call()
        finally:
            set_cut()

    return run


def _makers(workload: Workload, base: Base, grads: Sequence[Tensor], device: str, backends: Sequence[str]) -> dict[str, Callable[[], Call]]:
    """Ours and the published loop."""
    makers: dict[str, Callable[[], Call]] = {}
    for backend in backends:
        makers[provider(backend)] = lambda backend=backend: _call(_ours(make_params(grads), base, device, backend))
        if device != "cpu" and _is_about_launching(workload):
            makers[graph_of(backend)] = lambda backend=backend: _replay(make_params(grads), base, device, backend)
    for name in LOOPS:
        makers[name] = lambda name=name: peers.call_of(name, make_params(grads), base)
    return makers


def _calls(makers: Mapping[str, Callable[[], Call]], workload: Workload, device: str, say: Callable[[str], None]) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    for name, make in makers.items():
        try:
            calls[name] = _ready(make())
        except Exception as error:  # the others are still of interest
            say(f"left out: {name} {workload.name}: {type(error).__name__}: {str(error)[:200]}")
    if device != "cpu" and provider("native") in calls:
        calls[FORWARDS] = _forwards(calls[provider("native")])
    return calls


def measure(
    workload: Workload,
    base_name: str,
    dtype_name: str,
    backends: Sequence[str],
    *,
    clock: Clock,
    device: str,
    copy_gbps: float,
    seconds: float,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Rows of the result file; of kind "launches" for what one step makes the device do. ``loops``: the published loop in the same rounds,
    by the same clock as ``wall_ms``. Peers take their turns among ours; of one tensor, which may fill the memory, after ours."""
    base, dtype = BASES[base_name], DTYPES[dtype_name]
    grads = make_grads(workload.shapes, dtype, device=device)
    whole = step_bytes(base_name, workload.numel, dtype.itemsize)
    alone = op_bytes(STEP_OPS[base_name][-1], workload.numel, dtype.itemsize)
    row = {"op": "step", "workload": workload.name, "dtype": dtype_name, "base": base_name}
    row |= {"n_tensors": workload.n_tensors, "numel": workload.numel}
    common = {"reference_ms_50": None, "regime": "memory", "note": ""}

    def rows(makers: Mapping[str, Callable[[], Call]]) -> Iterator[dict[str, Any]]:
        calls = _calls(makers, workload, device, say)
        timed = interleave(clock, calls, seconds=seconds)
        wall = wall_ms(clock, calls, timed, rounds=1 if device == "cpu" else WALL_ROUNDS)
        launch = launch_us(clock, calls, rounds=1 if device == "cpu" else LAUNCH_ROUNDS)
        if of_ours := [timed[provider(backend)].device.ms_50 for backend in backends if provider(backend) in timed]:
            common["reference_ms_50"] = of_ours[0]
        for name, found in timed.items():
            nbytes = peers.moved_bytes(name, alone, whole)
            measured = {"bytes": nbytes} | speed(found, nbytes, copy_gbps) | {"wall_ms": wall[name], "launch_us": launch[name]}
            yield {"kind": "step"} | row | {"backend": name} | measured | common | {"loops": _of(wall, LOOPS)}
        if device != "cpu":
            yield from _launches(calls, row)

    with contextlib.ExitStack() as stack:
        mesh = functools.cache(lambda: stack.enter_context(peers.one_rank_mesh(device)))
        is_about_launching = _is_about_launching(workload)
        sweeps = step_bytes(base_name, 1, 1)
        of_peers = peers.makers(workload, base, grads, sweeps, mesh, is_about_launching=is_about_launching, say=say)
        of_ours = _makers(workload, base, grads, device, backends)
        for makers in [of_ours | of_peers] if is_about_launching else [of_ours, of_peers]:
            yield from rows(makers)


def _launches(calls: Mapping[str, Call], row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Of ours, the published loop and the base alone."""
    for name, call in calls.items():
        if name in peers.NOT_RECORDED:
            continue
        activity = launches.record(call)
        if activity is not None:
            counts = {kind: len(getattr(activity, kind)) for kind in ("kernels", "copies", "fills")}
            yield {"kind": "launches"} | row | {"backend": name} | counts | {"names": str(activity)}


def _of(values: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    return {name: values[name] for name in names if name in values}
