"""Whole steps on the device, without forward and backward: ours on each backend, launched and replayed from a CUDA graph, the published
loop, and the base optimizer's own step, which no SAM can be cheaper than to launch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from bench.byte_model import STEP_OPS, op_bytes, step_bytes
from bench.gpu import launches
from bench.gpu.gate import Gate
from bench.gpu.ops import speed
from bench.gpu.timing import Call, Clock, interleave, launch_us, wall_ms
from bench.providers import BASES, PROVIDERS, RHO, Base, Stepper
from bench.providers.ours import OnBackend
from bench.workloads import DTYPES, Workload, make_grads, make_params
from sam_kernels import SAM
from sam_kernels._dispatch import reason_missing

__all__ = ["BACKENDS", "BASE_ALONE", "COMBINATIONS", "FORWARDS", "LOOPS", "allowed", "graph_of", "measure", "memory_needed", "provider"]

COMBINATIONS = (("sgd", "fp32"), ("adamw", "fp32"), ("adamw", "bf16"))
BACKENDS = ("native", "triton")  # those with kernels of their own for a device
LOOPS = ("davda54/foreach", "davda54/fused")
BASE_ALONE = "torch, fused base alone"
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
    """One tensor takes as many launches as the operations have: of a graph and of the base alone there is nothing to learn."""
    return workload.n_tensors > 1


def memory_needed(workload: Workload, base: str, dtype_name: str, backends: Sequence[str]) -> int:
    """Bytes: parameters, backups and state of each optimizer, the gradients they share, and a loop's temporaries."""
    optimizers = len(LOOPS) + len(backends) + (len(backends) + 1 if _is_about_launching(workload) else 0)
    copies = optimizers * (2 + sum(key != "step" for key in BASES[base].state_keys)) + 1 + 4
    return workload.numel * DTYPES[dtype_name].itemsize * copies


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


def _calls(
    workload: Workload, base: Base, dtype: torch.dtype, device: str, backends: Sequence[str], say: Callable[[str], None]
) -> dict[str, Call]:
    grads = make_grads(workload.shapes, dtype, device=device)
    makers: dict[str, Callable[[], Call]] = {}
    for backend in backends:
        makers[provider(backend)] = lambda backend=backend: _call(_ours(make_params(grads), base, device, backend))
        if device != "cpu" and _is_about_launching(workload):
            makers[graph_of(backend)] = lambda backend=backend: _replay(make_params(grads), base, device, backend)
    for name in LOOPS:
        makers[name] = lambda name=name: _call(PROVIDERS[name].make(make_params(grads), base))
    if _is_about_launching(workload):
        makers[BASE_ALONE] = lambda: base.optimizer(make_params(grads), **{**base.kwargs, "fused": True}).step
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
    by the same clock as ``wall_ms``."""
    base, dtype = BASES[base_name], DTYPES[dtype_name]
    calls = _calls(workload, base, dtype, device, backends, say)
    timed = interleave(clock, calls, seconds=seconds)
    wall, launch = wall_ms(clock, calls, timed), launch_us(clock, calls)
    whole, alone = step_bytes(base_name, workload.numel, dtype.itemsize), op_bytes(STEP_OPS[base_name][-1], workload.numel, dtype.itemsize)
    reference = next((timed[provider(backend)].device.ms_50 for backend in backends if provider(backend) in timed), None)
    row = {"op": "step", "workload": workload.name, "dtype": dtype_name, "base": base_name}
    size = {"n_tensors": workload.n_tensors, "numel": workload.numel}
    common = {"reference_ms_50": reference, "loops": _of(wall, LOOPS), "regime": "memory", "note": ""}
    for name, found in timed.items():
        nbytes = alone if name == BASE_ALONE else whole
        measured = {"bytes": nbytes} | speed(found, nbytes, copy_gbps) | {"wall_ms": wall[name], "launch_us": launch[name]}
        yield {"kind": "step"} | row | {"backend": name} | size | measured | common
    if device != "cpu":
        for name, call in calls.items():
            activity = launches.record(call)
            if activity is not None:
                counts = {kind: len(getattr(activity, kind)) for kind in ("kernels", "copies", "fills")}
                yield {"kind": "launches"} | row | {"backend": name} | size | counts | {"names": str(activity)}


def _of(values: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    return {name: values[name] for name in names if name in values}
