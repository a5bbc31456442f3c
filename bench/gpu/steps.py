"""Whole steps on the device, without forward and backward: ours, launched and replayed from a CUDA graph, and the published loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from bench.byte_model import STEP_OPS, step_bytes
from bench.gpu import launches
from bench.gpu.gate import Gate
from bench.gpu.ops import speed
from bench.gpu.timing import Call, Clock, interleave
from bench.providers import BASES, PROVIDERS, RHO, Base, Stepper
from bench.providers.ours import OnBackend
from bench.workloads import DTYPES, Workload, make_grads, make_params
from sam_kernels import SAM

__all__ = ["COMBINATIONS", "GRAPH", "LOOPS", "REFERENCE", "allowed", "measure", "memory_needed"]

COMBINATIONS = (("sgd", "fp32"), ("adamw", "fp32"), ("adamw", "bf16"))
REFERENCE = "sam_kernels/triton"
GRAPH = "sam_kernels/triton, graph"  # the same, capturable, its step recorded once
LOOPS = ("davda54/foreach", "davda54/fused")


def allowed(gate: Gate, base: str) -> bool:
    """Whether every operation of our step has passed its tests."""
    return all(gate.allows(op, REFERENCE.partition("/")[2]) for op in STEP_OPS[base])


def memory_needed(workload: Workload, base: str, dtype_name: str) -> int:
    """Bytes: parameters, backups and state of each of four optimizers, the gradients they share, and a loop's temporaries."""
    copies = 4 * (2 + sum(key != "step" for key in BASES[base].state_keys)) + 1 + 4
    return workload.numel * DTYPES[dtype_name].itemsize * copies


def _ours(params: Sequence[torch.nn.Parameter], base: Base, device: str, *, capturable: bool = False) -> Stepper:
    """AdamW's counters lie on the device where it is fused, as a user of one would have them. A dry run takes what the CPU has."""
    kwargs = {**base.kwargs, **({"fused": True} if "step" in base.state_keys and device != "cpu" else {})}
    optimizer = SAM(params, base.optimizer, rho=RHO, capturable=capturable, **kwargs)
    return OnBackend(optimizer, "foreach" if device == "cpu" else REFERENCE.partition("/")[2])


def _call(stepper: Stepper) -> Call:
    def run() -> None:
        stepper.first_step()
        stepper.second_step()

    return run


def _graph_of(call: Call) -> Call:
    """A replay of one call, recorded after warm-up on a side stream, in which state and tables are made."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _calls(workload: Workload, base: Base, dtype: torch.dtype, device: str, say: Callable[[str], None]) -> dict[str, Call]:
    grads = make_grads(workload.shapes, dtype, device=device)
    makers = {REFERENCE: partial(_ours, base=base, device=device)} | {name: partial(PROVIDERS[name].make, base=base) for name in LOOPS}
    calls: dict[str, Call] = {}
    for name, make in makers.items():
        try:
            call = _call(make(make_params(grads)))
            for _ in range(2):  # state and tables are made
                call()
            calls[name] = call
        except Exception as error:  # the others are still of interest
            say(f"left out: {name} {workload.name}: {type(error).__name__}: {str(error)[:200]}")
    if device != "cpu" and REFERENCE in calls:
        try:
            calls[GRAPH] = _graph_of(_call(_ours(make_params(grads), base, device, capturable=True)))
        except Exception as error:
            say(f"left out: {GRAPH} {workload.name}: {str(error)[:200]}")
    return calls


def measure(
    workload: Workload,
    base_name: str,
    dtype_name: str,
    *,
    clock: Clock,
    device: str,
    copy_gbps: float,
    seconds: float,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Rows of the result file; of kind "launches" for what one step makes the device do."""
    base, dtype = BASES[base_name], DTYPES[dtype_name]
    calls = _calls(workload, base, dtype, device, say)
    timed = interleave(clock, calls, seconds=seconds)
    nbytes = step_bytes(base_name, workload.numel, dtype.itemsize)
    reference = timed[REFERENCE].device.ms_50 if REFERENCE in timed else None
    row = {"op": "step", "workload": workload.name, "dtype": dtype_name, "base": base_name}
    size = {"n_tensors": workload.n_tensors, "numel": workload.numel, "bytes": nbytes}
    for name, found in timed.items():
        measured = speed(found, nbytes, copy_gbps) | {"reference_ms_50": reference}
        yield {"kind": "step"} | row | {"backend": name} | size | measured | {"regime": "memory", "note": ""}
    if device != "cpu":
        for name, call in calls.items():
            activity = launches.record(call)
            if activity is not None:
                counts = {kind: len(getattr(activity, kind)) for kind in ("kernels", "copies", "fills")}
                yield {"kind": "launches"} | row | {"backend": name} | size | counts | {"names": str(activity)}
