from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.byte_model import OPS, op_bytes
from bench.op_calls import describe_once, make_lists, ours
from bench.workloads import DTYPES, Workload

pytestmark = pytest.mark.benchmark(max_time=0.15, min_rounds=3, warmup=False, disable_gc=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_op(time_bytes: Callable[..., None], op: str, dtype: str, backend: str, workload: Workload) -> None:
    lists = describe_once(make_lists(op, workload.shapes, DTYPES[dtype]))
    call = ours(op, backend)
    time_bytes(lambda: call(lists), op_bytes(op, workload.numel, DTYPES[dtype].itemsize))
