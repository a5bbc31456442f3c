"""``pytest bench --benchmark-only``: cost and bandwidth of every operation and step, to catch regressions with ``--benchmark-compare``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.workloads import Workload
from sam_kernels._dispatch import BACKENDS, reason_missing

SHAPES = {
    "1_small": ((64, 64),),
    "100_small": ((3,), (64,), (16, 3, 3, 3), (64, 32)) * 25,
    "1_medium": ((2048, 1024),),
    "10_medium": ((512, 512),) * 10,
}


@pytest.fixture(params=list(SHAPES))
def workload(request: pytest.FixtureRequest) -> Workload:
    return Workload(request.param, request.param, SHAPES[request.param])


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    reason = reason_missing(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture
def time_bytes(benchmark: Any) -> Callable[[Callable[[], object], int], None]:
    """Times a call and notes the bytes it moves by the model, and its bandwidth."""

    def run(call: Callable[[], object], nbytes: int) -> None:
        benchmark.extra_info["bytes_moved"] = nbytes
        benchmark(call)
        if benchmark.stats is not None:  # None with --benchmark-disable
            benchmark.extra_info["gbps"] = nbytes / benchmark.stats.stats.median / 1e9

    return run
