"""What bytes, launches and instructions allow on a device: the bars are made of these. Derivation: docs/benchmarks.md, "Where the bars come
from"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.byte_model import OPS, STEP_OPS
from bench.gpu.device import multiprocessors_and_gigahertz

__all__ = [
    "DRAWN",
    "FULL",
    "INSTRUCTIONS",
    "LOOP_SWEEPS",
    "SMALL",
    "beside_loop",
    "issue_ms",
    "launches_of",
    "least_percent",
    "loop_ratio",
    "percent_of_copy",
    "reweighted_ratio",
    "sam_ratio",
    "step_launches",
]

FULL, SMALL = 97.0, 85.0  # percent of a copy's bandwidth: 10^8 elements, and the size of ResNet-18
LARGE = 10**8
LAUNCH_MS = 0.003  # from one kernel's last store to the next one's memory being busy: start, first loads, and the last blocks alone
SAME = 0.01  # what repeating a measurement of a whole training step changes

# Instructions that a thread issues for each element in the main loop on sm_90: python -m bench.machine_code.instructions. Of centralize_
# there are two loops over the same elements, and none is counted.
INSTRUCTIONS = {
    "native": {
        "grad_norm": {"fp32": 3.5, "bf16": 3.7},
        "direction_norm_": {"fp32": 22.5, "bf16": 23.6},
        "grad_dots": {"fp32": 7.5, "bf16": 8.2},
        "combine_": {"fp32": 10.5, "bf16": 10.9},
        "perturb_": {"fp32": 10.2, "bf16": 10.1},
        "random_perturb_": {"fp32": 63.0, "bf16": 62.0},
        "restore_": {"fp32": 2.5, "bf16": 1.2},
        "sgd_step_": {"fp32": 14.2, "bf16": 16.1},
        "adamw_step_": {"fp32": 48.3, "bf16": 52.1},
    },
    "triton": {
        "grad_norm": {"fp32": 2.4, "bf16": 4.2},
        "direction_norm_": {"fp32": 21.2, "bf16": 25.4},
        "grad_dots": {"fp32": 6.8, "bf16": 10.0},
        "combine_": {"fp32": 17.4, "bf16": 20.1},
        "perturb_": {"fp32": 4.5, "bf16": 7.3},
        "random_perturb_": {"fp32": 60.4, "bf16": 61.4},
        "restore_": {"fp32": 0.8, "bf16": 0.5},
        "sgd_step_": {"fp32": 9.5, "bf16": 13.2},
        "adamw_step_": {"fp32": 49.1, "bf16": 55.0},
    },
}
DRAWN = "random_perturb_"  # the one that takes about as long to issue as to move
# Of the longer of both times, as much of the shorter one goes on beside it: half, and a quarter where a multiprocessor holds 512 threads.
HIDDEN, HIDDEN_DRAWN = 0.5, 0.25
SCHEDULERS, LANES = 4, 32  # of a multiprocessor: each issues an instruction for 32 threads a cycle

# Operations of two kernels: Adam's counters advance in one of their own; in Triton these sums are added up by a second one.
_TWO = {"native": ("adamw_step_",), "triton": ("adamw_step_", "centralize_", "grad_dots")}
# Parameter-sized lists that the published loop reads and writes in a step with SGD and momentum, by its base: norm 3 (a product with 1.0
# is written), copy 2, perturbation 4 + 3, exchange of pointers 0, update 5, or in three operations 2 + 3 + 3.
LOOP_SWEEPS = {"davda54/foreach": 20, "davda54/fused": 17}
EFFICIENCY = 0.99  # of ours beside torch's elementwise kernels, both waiting for the memory


def launches_of(op: str, backend: str) -> int:
    return 2 if op in _TWO.get(backend, ()) else 1


def step_launches(base: str) -> int:
    """Of our step, on either backend: its operations', and the check of the second gradients."""
    return sum(launches_of(op, "native") for op in STEP_OPS[base]) + 1


def issue_ms(op: str, backend: str, dtype: str, numel: int) -> float | None:
    """Milliseconds that issuing the instructions of an operation takes on this device, at its highest clock. None where they were not
    counted, or where the device does not tell how fast it is."""
    counted = INSTRUCTIONS.get(backend, {}).get(op)
    multiprocessors, gigahertz = multiprocessors_and_gigahertz()
    if counted is None or not multiprocessors or not gigahertz:
        return None
    return numel * counted[dtype] / (multiprocessors * SCHEDULERS * LANES * gigahertz * 1e6)


def percent_of_copy(most: float, nbytes: int, copy_gbps: float, launches: int, issue: float | None = None, hidden: float = HIDDEN) -> float:
    """The least percentage of a copy's bandwidth: ``most``, or what launches and instructions leave of it."""
    copy_ms = nbytes / copy_gbps / 1e6
    longer, shorter = max(copy_ms, issue or 0.0), min(copy_ms, issue or 0.0)
    busy = longer + max(0.0, shorter - hidden * longer)
    return min(most, 100 * copy_ms / (busy + launches * LAUNCH_MS))


def least_percent(row: Mapping[str, Any], most: float) -> float | None:
    """The same, of an operation's row. None where instructions may decide, and the device's speed is not known."""
    op, issue = row["op"], row["issue_ms"]
    if op == DRAWN and issue is None:
        return None
    hidden = HIDDEN_DRAWN if op == DRAWN else HIDDEN
    return percent_of_copy(most, row["bytes"], row["copy_gbps"], launches_of(op, row["backend"]), issue, hidden)


def loop_ratio(base: str, loop: str) -> float:
    """How many times longer the published loop takes where bytes decide. With SGD and momentum."""
    ours = sum(OPS[op].passes for op in STEP_OPS[base]) + 1
    return EFFICIENCY * LOOP_SWEEPS[loop] / ours


def beside_loop(asked: float, loop_ms: float, row: Mapping[str, Any]) -> float:
    """How many times longer the published loop is to take where the host decides for it: as asked, or what our bytes allow beside the loop
    as it was measured. ``row``: of our step."""
    most = FULL if row["numel"] >= LARGE else SMALL
    percent = percent_of_copy(most, row["bytes"], row["copy_gbps"], step_launches(row["base"]))
    return min(asked, loop_ms / (row["bytes"] / row["copy_gbps"] / 1e6 * 100 / percent))


def sam_ratio(base_ms: float, base_bytes: int, sam_bytes: int, copy_gbps: float) -> float:
    """The most that a step of SAM takes beside two steps of the base, ``base_ms`` together: one, and the bytes it moves beyond theirs."""
    more_ms = max(0, sam_bytes - base_bytes) / copy_gbps / 1e6
    return 1 + more_ms / base_ms + SAME


def reweighted_ratio(sam_ms: float, flops: int, norm_flops: int, norm_bytes: int, copy_gbps: float) -> float:
    """The most that a step of RW-SAM takes beside one of SAM: its norms' products as fast as the rest of the step computes, and their
    bytes as fast as a copy, one after the other."""
    return 1 + norm_flops / flops + norm_bytes / copy_gbps / 1e6 / sam_ms + SAME
