"""The denominators: how fast this device copies, reads and writes, in this process, over more than its caches hold."""

from __future__ import annotations

from typing import Any

import torch

from bench.gpu.timing import Call, Clock, interleave

__all__ = ["measure"]

NBYTES = 2 << 30


def _calls(source: torch.Tensor, target: torch.Tensor) -> dict[str, tuple[Call, int]]:
    """name -> call, passes over the buffer. Two ways where torch has two: the faster one counts."""
    return {
        "copy copy_": (lambda: target.copy_(source), 2),
        "copy neg": (lambda: torch.neg(source, out=target), 2),
        "read sum": (lambda: source.sum(), 1),
        "read amax": (lambda: source.amax(), 1),
        "write zero_": (lambda: target.zero_(), 1),
        "write fill_": (lambda: target.fill_(1.5), 1),
    }


def measure(clock: Clock, device: str, *, nbytes: int = NBYTES, seconds: float = 2.0) -> dict[str, Any]:
    """{"copy": {"gbps", "by"}, "read": …, "write": …}; a copy's bytes are those read and those written."""
    source = torch.rand(nbytes // 4, device=device)
    target = torch.empty_like(source)
    calls = _calls(source, target)
    timed = interleave(clock, {name: call for name, (call, _) in calls.items()}, seconds=seconds)
    found: dict[str, Any] = {}
    for name, (_, passes) in calls.items():
        kind, by = name.split()
        gbps = passes * source.numel() * 4 / timed[name].device.ms_50 / 1e6
        if kind not in found or gbps > found[kind]["gbps"]:
            found[kind] = {"gbps": gbps, "by": by, "bytes": passes * source.numel() * 4}
    return found
