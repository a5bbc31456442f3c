"""Each operation of a step with float32 masters of bfloat16 parameters, beside the fastest plain pass over lists of the same widths."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import floor
from bench.byte_model import MASTER_OPS, NARROW_LISTS, master_bytes
from bench.masters.clock import best_clock
from bench.op_calls import ADAMW, SGD
from bench.timing import Quantiles, interleave, quantiles
from bench.workloads import Workload
from sam_kernels import functional as F
from sam_kernels._tensor_list import TensorList

__all__ = ["STOCHASTIC", "measure"]

Lists = dict[str, list[Tensor]]
STOCHASTIC = ", stochastic rounding"
FLOOR = "floor: "
TINY = 1e-6  # weights are the same at every call


def make_lists(workload: Workload) -> Lists:
    """All lists of all operations, described once, as the optimizer calls them."""
    widths = {name: torch.bfloat16 if name in NARROW_LISTS else torch.float32 for op in MASTER_OPS.values() for name in op.lists}
    return {name: TensorList([torch.rand(shape).to(dtype) for shape in workload.shapes]) for name, dtype in widths.items()}


def calls_on(lists: Lists, norm: Tensor, steps: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Each operation of :data:`bench.byte_model.MASTER_OPS`; those that round to the parameters, stochastically too."""
    params, grads, masters = lists["params"], lists["grads"], lists["old_params"]
    perturb = partial(F.perturb_, params, grads, masters, norm, rho=TINY, from_old=True)
    to = {"old_params": masters, "to_old": True}
    sgd = partial(F.sgd_step_, params, grads, lists["momentum_buffers"], **{**SGD, "lr": TINY}, **to)
    adamw = partial(
        F.adamw_step_, params, grads, lists["exp_avgs"], lists["exp_avg_sqs"], steps, decoupled=True, **{**ADAMW, "lr": TINY}, **to
    )
    stochastic = {"perturb_": perturb, "sgd_step_": sgd, "adamw_step_": adamw}
    return {
        "grad_norm": partial(F.grad_norm, grads),
        "check_finite_": partial(F.check_finite_, grads, torch.zeros(())),
        "restore_": partial(F.restore_, params, masters),
        **stochastic,
        **{f"{op}{STOCHASTIC}": partial(run, rounding_seed=1) for op, run in stochastic.items()},
    }


def _floor_calls(op: str, numel: int, clock: Callable[[], int]) -> dict[str, Callable[[], object]]:
    """The finalists among the plain passes."""
    traffic = MASTER_OPS[op]
    if traffic.writes:
        buffers = floor.buffers_of_widths(traffic, numel, NARROW_LISTS)
        passes = floor.candidates_of_widths(traffic, NARROW_LISTS)
    else:
        buffers, passes = floor.flat_buffers(traffic, 2 * numel), floor.candidates(traffic)
    return {f"{FLOOR}{name}": partial(run, buffers) for name, run in floor.finalists(passes, [buffers], clock=clock).items()}


def measure(workload: Workload, *, rounds: int) -> list[dict[str, Any]]:
    """A row an operation: milliseconds, GB/s, and percent of its floor, whose best pass takes turns with it."""
    clock, rows = best_clock(), []
    ours = calls_on(make_lists(workload), torch.tensor(1.0), [torch.tensor(1.0) for _ in workload.shapes])
    for op in MASTER_OPS:
        calls = {name: run for name, run in ours.items() if name.removesuffix(STOCHASTIC) == op}
        plain = _floor_calls(op, workload.numel, clock)
        samples = interleave({**calls, **plain}, rounds=rounds, warmup=1, clock=clock)
        found = {name: quantiles(each) for name, each in samples.items()}
        best = min(plain, key=lambda name: found[name].ms_50, default=None)
        nbytes = master_bytes(op, workload.numel)
        floor_ms = None if best is None else found[best].ms_50
        rows += [
            {"op": name, "bytes": nbytes, "floor": best and best.removeprefix(FLOOR), **_speed(found[name], nbytes, floor_ms)}
            for name in calls
        ]
    return rows


def _speed(found: Quantiles, nbytes: int, floor_ms: float | None) -> dict[str, Any]:
    return {
        "ms": [found.ms_20, found.ms_50, found.ms_80],
        "gbps": nbytes / found.ms_50 / 1e6,
        "pct_floor": None if floor_ms is None else 100 * floor_ms / found.ms_50,
    }
