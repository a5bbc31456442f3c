"""Seeds, backends, and what this machine can test, said at the top of every run."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import pytest
import torch

from sam_kernels._dispatch import BACKENDS, available, reason_missing, use_backend
from sam_kernels.backends.native import CUDA_ON_HOST
from tests.helpers import interpreter

INTERPRETED = interpreter.is_interpreted()
if INTERPRETED:
    interpreter.prepare()
if os.environ.get("TRITON_INTERPRET") == "1" and not INTERPRETED:
    pytest.exit("TRITON_INTERPRET=1, and no triton that could interpret: nothing to test", returncode=0)
if CUDA_ON_HOST and (reason := reason_missing("native")) is not None:
    pytest.exit(f"SAM_KERNELS_CUDA_ON_HOST=1: {reason}", returncode=1)
collect_ignore = [*([] if INTERPRETED else ["interpreted"]), *([] if CUDA_ON_HOST else ["on_host"])]
# A process that interprets Triton's kernels, or runs CUDA's on the host, tests those alone: everything else has a process of its own.
TESTED = ["triton"] if INTERPRETED else ["native"] if CUDA_ON_HOST else list(BACKENDS)


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETED:  # overflow is what the kernels are tested with, and numpy says so each time
        config.addinivalue_line("filterwarnings", "ignore:.*encountered in.*:RuntimeWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETED:
        mine = {"interpreted", "gpu"}  # gpu: a dry run of the device tests
        kept = [item for item in items if mine & set(item.path.parts) or {"backend", "backends"} & set(item.fixturenames)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_report_header() -> list[str]:
    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads"]
    for name in BACKENDS:
        reason = reason_missing(name)
        lines.append(f"backend {name}: {'available' if reason is None else 'missing, ' + reason}")
    return lines


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """From the test's own name: the same numbers whichever tests run before it."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(params=TESTED)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, forced."""
    if (reason := reason_missing(request.param)) is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def backends() -> list[str]:
    """All backends of this machine at once, where the reference is the expensive part."""
    return [name for name in available() if name in TESTED]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For thousands of small calls, where waking threads costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
