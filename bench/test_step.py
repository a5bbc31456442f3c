from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.byte_model import step_bytes
from bench.providers import BASES, PROVIDERS
from bench.workloads import DTYPES, Workload, make_grads, make_params

pytestmark = pytest.mark.benchmark(max_time=0.15, min_rounds=3, warmup=False, disable_gc=True)


@pytest.mark.parametrize(("base", "dtype"), [("sgd", "fp32"), ("adamw", "fp32"), ("adamw", "bf16")])
def test_step(time_bytes: Callable[..., None], base: str, dtype: str, backend: str, workload: Workload) -> None:
    params = make_params(make_grads(workload.shapes, DTYPES[dtype]))
    optimizer = PROVIDERS[f"sam_kernels/{backend}"].make(params, BASES[base])

    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    step()
    time_bytes(step, step_bytes(base, workload.numel, DTYPES[dtype].itemsize))
