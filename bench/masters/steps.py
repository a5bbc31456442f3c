"""Optimizer steps at a workload's shapes: SAM on masters, SAM in float32, and the usual loop on masters, in turns in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from bench.byte_model import master_step_bytes, step_bytes
from bench.masters.clock import best_clock
from bench.masters.loop import IMPLEMENTATIONS, MastersLoop
from bench.masters.memory import MemoryOf, bytes_of
from bench.providers import BASES, RHO
from bench.timing import interleave, quantiles
from bench.workloads import Workload, make_grads, make_params
from sam_kernels import SAM

__all__ = ["FLOAT32", "LOOP", "MASTERS", "OPTIONS", "measure"]

MASTERS, FLOAT32, LOOP = "bfloat16, masters", "float32", "loop, bfloat16, masters"
OPTIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {  # of SAM
    MASTERS: (torch.bfloat16, {"master_weights": True}),
    FLOAT32: (torch.float32, {}),
    f"{MASTERS}, stochastic rounding": (torch.bfloat16, {"master_weights": True, "stochastic_rounding": True}),
    "bfloat16, updates rounded stochastically": (torch.bfloat16, {"stochastic_rounding": "update"}),
}


def _sam_step(optimizer: SAM) -> None:
    optimizer.first_step()
    optimizer.second_step()


def measure(workload: Workload, base_name: str, *, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step of each, ratios to SAM on masters, and bytes a parameter.

    The loop's implementations share weights and state; the fastest is the loop. Masters are compared with the parameters at steps 1, 2, 4,
    8, …: a median does not see those.
    """
    base = BASES[base_name]
    narrow_grads = make_grads(workload.shapes, torch.bfloat16)
    grads = {torch.bfloat16: narrow_grads, torch.float32: [grad.to(torch.float32) for grad in narrow_grads]}
    optimizers: dict[str, SAM] = {}
    for name, (dtype, options) in OPTIONS.items():
        optimizers[name] = SAM(make_params(grads[dtype]), base.optimizer, rho=RHO, **base.kwargs, **options)
    loop = MastersLoop(make_params(narrow_grads), base)
    calls: dict[str, Callable[[], object]] = {name: partial(_sam_step, optimizer) for name, optimizer in optimizers.items()}
    calls |= {f"{LOOP}, {each}": partial(loop.step, each) for each in IMPLEMENTATIONS}
    samples = interleave(calls, rounds=rounds, warmup=2, clock=best_clock())
    found = {name: quantiles(each) for name, each in samples.items()}
    fastest = min((name for name in found if name.startswith(LOOP)), key=lambda name: found[name].ms_50)
    memory: dict[str, MemoryOf] = {name: bytes_of(optimizer, calls[name], workload.numel) for name, optimizer in optimizers.items()}
    memory[fastest] = bytes_of(loop.optimizer, calls[fastest], workload.numel)
    return {
        "workload": workload.name,
        "base": base_name,
        "threads": torch.get_num_threads(),
        "model_bytes": {MASTERS: master_step_bytes(base_name, workload.numel), FLOAT32: step_bytes(base_name, workload.numel, 4)},
        "ms": {name: [each.ms_20, each.ms_50, each.ms_80] for name, each in found.items()},
        "of_masters": {
            name: round(median(other / ours for other, ours in zip(each, samples[MASTERS], strict=True)), 3)
            for name, each in samples.items()
        },
        "fastest_loop": fastest,
        "bytes_per_param": {name: {"between": each.between, "peak": each.peak} for name, each in memory.items()},
    }
