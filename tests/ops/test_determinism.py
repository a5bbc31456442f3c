"""Bits depend on the inputs alone: not on the run, the number of threads, the instruction set or the stores that bypass the caches."""

import functools
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sam_kernels import functional
from sam_kernels.validation.check import build
from sam_kernels.validation.options import OPTIONS
from sam_kernels.validation.problem import run
from tests.helpers.compare import assert_same_bits

ROOT = Path(__file__).resolve().parents[2]
NEEDS = {"baseline": set(), "avx2": {"avx2", "fma", "f16c"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "f16c"}}
OPTION = {
    "grad_norm": "adaptive",
    "grad_norms": "plain",
    "centralize_": "adaptive",
    "direction_norm_": "friendly_adaptive",
    "grad_dots": "origins",
    "combine_": "origins",
    "perturb_": "adaptive_eta",
    "random_perturb_": "normal",
    "sgd_step_": "nesterov_old",
    "adamw_step_": "adamw_old",
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def outcome(op: str, dtype: str, case: str) -> list[Tensor | None]:
    problem = build(op, case, dtype, OPTION.get(op, op.rstrip("_")))
    result = run(problem)
    return [*([result] if isinstance(result, Tensor) else []), *(tensor for tensors in problem.lists.values() for tensor in tensors)]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("op", OPTIONS)
def test_threads_and_runs(backend: str, op: str) -> None:
    # The interpreter runs one program after another: it shows what reads memory that nobody wrote, in one dtype as in two.
    for dtype in ("bfloat16",) if backend == "triton" else ("float32", "bfloat16"):
        for case in ("chunk_edges", "many_tiny", *(("slices", "long_slices") if op == "centralize_" else ())):
            torch.set_num_threads(1)
            one = outcome(op, dtype, case)
            for count in (1,) if backend == "triton" else (2, 3, 1):  # whose programs are no threads of ours
                torch.set_num_threads(count)
                assert_same_bits(f"{op} {dtype} {case}, {count} threads", outcome(op, dtype, case), one)


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() else set()


@functools.cache
def digests(isa: str, is_full: bool) -> list[str]:
    """Of results by instruction set: the baseline without prefetches, the others with them, whatever this processor would choose."""
    env = {**os.environ, "SAM_KERNELS_ISA": isa, "SAM_KERNELS_PREFETCH": "0" if isa == "baseline" else "1"}
    command = [sys.executable, "-m", "tests.helpers.digest", *(["--full"] if is_full else [])]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.native
@pytest.mark.parametrize("isa", [isa for isa in NEEDS if isa != "baseline"])
def test_instruction_sets(isa: str, is_full: bool) -> None:
    pytest.importorskip("sam_kernels._cpu")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip(f"{isa} is of x86-64, this is {platform.machine()}")
    if missing := NEEDS[isa] - cpu_flags():
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")
    baseline, this = digests("baseline", is_full), digests(isa, is_full)
    assert (baseline[0], this[0]) == ("baseline", isa)
    assert len(this) == len(baseline) > 100
    assert [pair for pair in zip(this[1:], baseline[1:], strict=True) if pair[0] != pair[1]] == []


@pytest.mark.native
@pytest.mark.parametrize(("name", "value"), [("SAM_KERNELS_ISA", "sse"), ("SAM_KERNELS_PREFETCH", "yes")])
def test_a_wrong_variable_is_named(name: str, value: str) -> None:
    pytest.importorskip("sam_kernels._cpu")
    command = [sys.executable, "-c", "import torch, sam_kernels._cpu as cpu; cpu.instruction_set()"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, name: value}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"RuntimeError: {name}={value}: " in done.stderr.splitlines()[-1]


@pytest.mark.native
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streaming_stores_change_nothing(dtype: torch.dtype, offset: int) -> None:
    """Above 32 MiB write-only outputs bypass the caches; the same rows in pieces below it do not."""
    pytest.importorskip("sam_kernels._cpu")
    numel, pieces = 5 * 1024 * 1024 + 13, 8
    old, grad = (torch.randn(numel + offset).to(dtype)[offset:] for _ in range(2))
    norm = torch.tensor(3.0)

    def outputs(cut: int) -> list[Tensor]:
        perturbed, saved, restored, stepped, combined = (torch.full_like(old, torch.nan) for _ in range(5))
        source = old.clone()
        size = -(-numel // cut)
        for part in (slice(i, i + size) for i in range(0, numel, size)):
            functional.perturb_([perturbed[part]], [grad[part]], [old[part]], norm, rho=0.05, from_old=True)
            functional.perturb_([source[part]], [grad[part]], [saved[part]], norm, rho=0.05)
            functional.restore_([restored[part]], [old[part]])
            functional.sgd_step_([stepped[part]], [grad[part]], None, old_params=[old[part]], lr=0.1, weight_decay=0.1)
            functional.combine_([combined[part]], [old[part]], [grad[part]], left_weight=0.5, right_weight=0.1)
        return [perturbed, saved, source, restored, stepped, combined]

    whole = outputs(1)
    assert_same_bits("streamed", whole, outputs(pieces))
    assert_same_bits("restored", [whole[1], whole[3]], [old, old])
