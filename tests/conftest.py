"""Seeds, backends, and what this machine can test, said at the top of every run."""

from __future__ import annotations

import gc
import os
import zlib
from collections.abc import Iterator
from importlib.metadata import version

import pytest
import torch

from sam_kernels._dispatch import BACKENDS, available, reason_missing, use_backend
from sam_kernels.backends.native import CUDA_ON_HOST
from tests.helpers import interpreter
from tests.helpers.pairwise import covering_pairs

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
ALWAYS_WHOLE = 24  # items of a function: up to so many, the whole product runs
DEVICE_TESTS = "gpu"  # always the whole product: a device is there for minutes, and then for these tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="Run the full product of parameters, not only the items that cover every pair.")
    parser.addoption("--beyond-pairs", action="store_true", help="Run only the items that --full adds.")


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist writes a group into an attribute that pytest 9.2 no longer has: without a word, each worker makes what a group shares.
    if config.getoption("dist", "no") == "loadgroup" and not hasattr(pytest.Item, "_nodeid") and version("pytest-xdist") == "3.8.0":
        raise pytest.UsageError(f"--dist loadgroup has no effect with pytest {pytest.__version__}: install the pytest of constraints.txt")
    if INTERPRETED:  # overflow is what the kernels are tested with, and numpy says so each time
        config.addinivalue_line("filterwarnings", "ignore:.*encountered in.*:RuntimeWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if _belongs_here(item)]
    if config.getoption("--beyond-pairs"):
        covering = set(_with_every_pair(kept))
        kept = [item for item in kept if item not in covering or "is_full" in item.fixturenames]  # type: ignore[attr-defined]
    elif not config.getoption("--full"):
        kept = _with_every_pair(kept)
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = sorted(kept, key=lambda item: item.get_closest_marker("slow") is None)  # first: none is left alone at the end


def pytest_collection_finish() -> None:
    """Modules and items live as long as the process: no collection of garbage goes through them again, a second each."""
    gc.collect()
    gc.freeze()


def _belongs_here(item: pytest.Item) -> bool:
    """Whether an item depends on the kernels of a process that has a backend of its own to test."""
    if not INTERPRETED and not CUDA_ON_HOST:
        return True
    if {"interpreted", "on_host", DEVICE_TESTS} & set(item.path.parts):  # DEVICE_TESTS: a dry run of them
        return True
    uses_backend = {"backend", "backends"} & set(item.fixturenames)  # type: ignore[attr-defined]
    return bool(uses_backend) and item.get_closest_marker("engine") is None


def _with_every_pair(items: list[pytest.Item]) -> list[pytest.Item]:
    """Items of each function in which every pair of values of two parameters that occurs in its product occurs."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen: set[pytest.Item] = set()
    for own in functions.values():
        is_whole = len(own) <= ALWAYS_WHOLE or DEVICE_TESTS in own[0].path.parts
        # repr: parameters need not be hashable. Equal values of a product are one object, whose repr is one too.
        rows = [{name: repr(value) for name, value in item.callspec.params.items()} for item in own] if not is_whole else []  # type: ignore[attr-defined]
        chosen.update(own if is_whole else (own[i] for i in covering_pairs(rows)))
    return [item for item in items if item in chosen]


def pytest_report_header() -> list[str]:
    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads"]
    for name in BACKENDS:
        reason = reason_missing(name)
        lines.append(f"backend {name}: {'available' if reason is None else 'missing, ' + reason}")
    return lines


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """From the test's own name, without the group that pytest-xdist adds: the same numbers whichever tests run before it."""
    torch.manual_seed(zlib.crc32(f"{request.node.parent.nodeid}::{request.node.name}".encode()))


@pytest.fixture(scope="session")
def is_full(pytestconfig: pytest.Config) -> bool:
    """Whether a test goes through the full product that it has inside."""
    return bool(pytestconfig.getoption("--full") or pytestconfig.getoption("--beyond-pairs"))


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
def wide_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are about many numbers, each by itself, and about no border of a block: the interpreter's time is by blocks."""
    if INTERPRETED:
        interpreter.widen_blocks(monkeypatch)


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
