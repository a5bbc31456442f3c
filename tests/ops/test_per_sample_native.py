"""What the CPU's kernels promise beside the numbers: bits, memory, instruction sets, and no reading out of bounds."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sam_kernels import _dispatch
from sam_kernels.backends.native import CUDA_ON_HOST
from sam_kernels.functional import per_sample
from tests.helpers.per_sample import CONVOLUTIONS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.native, pytest.mark.skipif(CUDA_ON_HOST, reason="the CPU's kernels have a process of their own")]


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    pytest.importorskip("sam_kernels._cpu")
    before = torch.get_num_threads()
    with _dispatch.use_backend("native"):
        yield
    torch.set_num_threads(before)


def outcomes() -> list[Tensor]:
    """Everything large enough to be shared among threads, from the same numbers each time."""
    torch.manual_seed(3)
    results = []
    for m, tokens, in_features, out_features in ((40, 1, 400, 300), (9, 20, 300, 100), (1, 300, 200, 260), (7, 40, 100, 90)):
        inputs, grads = torch.randn(m, tokens, in_features), torch.randn(m, tokens, out_features)
        for method in ("gram", "direct"):
            norms = torch.zeros(m, dtype=torch.float64)
            per_sample.linear_square_norms_(norms, inputs, grads, method=method)
            results.append(norms)
        products = torch.full((m, out_features, in_features), torch.nan)
        again = torch.zeros(m, dtype=torch.float64)
        per_sample.linear_square_norms_(again, inputs, grads, products, method="direct")
        assert torch.equal(again, results[-1])  # keeping the products changes no bit
        results.append(products)
    for name in ("several_blocks_of_positions", "channel_groups", "features_over_a_block"):
        case = CONVOLUTIONS[name]
        inputs, grads = case.tensors(torch.float32, torch.float32)
        for method in ("gram", "direct"):
            norms = torch.zeros(case.groups_of_samples, dtype=torch.float64)
            per_sample.conv_square_norms_(norms, inputs, grads, groups=case.groups, method=method, **case.options())
            results.append(norms)
    for shape in ((1, 4000, 100, 1), (6, 2, 30, 1000)):
        weight, bias = torch.empty(shape[0], shape[2]), torch.empty(shape[0], shape[2])
        per_sample.affine_grads_(weight, bias, torch.randn(shape), torch.randn(shape))
        results += [weight, bias]
    norms = torch.zeros(3, dtype=torch.float64)
    per_sample.embedding_square_norms_(norms, torch.randint(0, 40, (3, 900)), torch.randn(3, 900, 130))
    return [*results, norms]


def test_bits_depend_on_neither_the_run_nor_the_threads() -> None:
    torch.set_num_threads(1)
    one = outcomes()
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(outcomes(), one, strict=True)), threads


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_against_the_reference(isa: str) -> None:
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if isa == "avx2" and (platform.machine().lower() not in ("x86_64", "amd64") or not {"avx2", "fma", "f16c"} <= set(flags)):
        pytest.skip("this processor lacks it")
    files = [str(Path(__file__).with_name(f"test_per_sample_{name}.py")) for name in ("linear", "conv", "sums")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "native", *files]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "SAM_KERNELS_ISA": isa}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


MEASURED = """
import resource, torch
from sam_kernels import functional, use_backend
from sam_kernels.functional.per_sample import conv_square_norms_, linear_square_norms_
use_backend("native")
torch.set_num_threads(2)
def run(small):
    n = torch.zeros(2, dtype=torch.float64)
    width, tokens = (40, 40) if small else (2048, 3000)
    linear_square_norms_(n, torch.ones(2, 30, width), torch.ones(2, 30, width), method="direct")  # 16 MiB a gradient
    linear_square_norms_(n, torch.ones(2, tokens, 30), torch.ones(2, tokens, 30), method="gram")  # 34 MiB a product of tokens
    side = 8 if small else 96
    x = torch.ones(2, 16, side, side)  # 5 MiB of patches a sample
    one = (1, 1)
    conv_square_norms_(n, x, x, kernel_size=(3, 3), stride=one, padding=one, dilation=one, method="direct")
run(True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory in KiB")
def test_no_gradient_no_product_of_tokens_and_no_patches_are_stored() -> None:
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("the sanitizer's own memory")
    done = subprocess.run([sys.executable, "-c", MEASURED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 9 * 1024  # operands: 1.2 MiB at most at a time; two threads' blocks: 1.2 MiB each


def test_the_binding_refuses_what_would_be_read_out_of_bounds() -> None:
    from sam_kernels import _cpu
    from sam_kernels.backends.native._cpu_lists import _lists

    norms, x = torch.zeros(2, dtype=torch.float64), torch.zeros(2, 3, 4)
    described = _lists.describe([norms, x, x])
    for sizes in ((2, 3, 4, 5), (2, 3, 5, 4), (2, 4, 4, 4), (1, 3, 4, 4), (2, 0, 4, 4), (-2, -3, 4, 4), (2, -3, -4, -4)):
        with pytest.raises(ValueError, match=r"size|groups|positive"):
            _cpu.linear_square_norms(described, *sizes, True, False, 1)
    with pytest.raises(ValueError, match="float64"):
        _cpu.linear_square_norms(_lists.describe([x, x, x]), 2, 3, 4, 4, True, False, 1)
    with pytest.raises(ValueError, match="contiguous"):
        _cpu.linear_square_norms(_lists.describe([norms, x.mT, x.mT]), 2, 4, 3, 3, True, False, 1)
    with pytest.raises(ValueError, match="products"):
        _cpu.linear_square_norms(_lists.describe([norms, x, x, torch.zeros(2, 4, 3)]), 2, 3, 4, 4, False, False, 1)
    one = (1, 1, 1)
    with pytest.raises(ValueError, match="kernel larger"):
        _cpu.conv_square_norms(described, 2, 1, 3, 3, 1, (1, 1, 4), (1, 1, 5), one, (0, 0, 0), one, True, 1)
    with pytest.raises(ValueError, match="size"):
        _cpu.conv_square_norms(described, 2, 1, 3, 3, 1, (1, 1, 4), (1, 1, 3), one, (0, 0, 0), one, True, 1)
    with pytest.raises(ValueError, match="size"):
        _cpu.affine_grads(_lists.describe([x]), False, False, 2, 3, 4, 2, 1)
    with pytest.raises(ValueError, match="indices"):
        _cpu.embedding_square_norms(_lists.describe([norms, x, torch.zeros(5).double()]), 2, 3, 4, None, 1)
