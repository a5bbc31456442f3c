"""Gradient norms per sample on the device: beside float64 on the CPU, bit for bit from run to run, in graphs, without waiting."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import _dispatch, use_backend
from sam_kernels.functional import per_sample
from sam_kernels.reference import per_sample as reference
from tests.helpers.devices import reason_without
from tests.helpers.per_sample_bounds import linear_bound

pytestmark = pytest.mark.cuda
IS_DEVICE = torch.cuda.is_available()
DTYPES = {
    "fp32": (torch.float32,) * 2,
    "bf16": (torch.bfloat16,) * 2,
    "fp16": (torch.float16,) * 2,
    "fp32_bf16": (torch.float32, torch.bfloat16),
    "bf16_fp16": (torch.bfloat16, torch.float16),
}
# Positions, d, p: odd sizes (scalar accesses) and multiples of 16 (16-byte ones), few positions and many, every tile.
SIZES = [
    (1, 40, 33),
    (2, 33, 17),
    (16, 64, 48),
    (17, 31, 65),
    (100, 128, 257),
    *([(16, 768, 320), (64, 768, 320), (257, 768, 320), (600, 72, 130)] if IS_DEVICE else []),
]
LINEAR = [
    f"{method}_{precision}_{dtypes}"
    for method in ("gram", "direct")
    for dtypes in DTYPES
    for precision in (("ieee", "tf32", "bf16") if "fp32" in dtypes else ("ieee",))
]
OPTIONS = {
    "linear_square_norms_": LINEAR,
    "conv_square_norms_": ["plain"],
    "affine_grads_": list(DTYPES),
    "embedding_square_norms_": list(DTYPES),
}


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape).to(dtype).to(device)


def check_linear(option: str, device: str) -> None:
    method, precision, name = option.split("_", 2)
    for tokens, d, p in SIZES:
        # 80: enough programs for the largest tiles.
        for m, bias in itertools.product((3, 80) if IS_DEVICE else (2,), (False, True)):
            a, g = random((m, tokens, d), DTYPES[name][0], device), random((m, tokens, p), DTYPES[name][1], device)
            norms = torch.full((m,), 2.0, dtype=torch.float64, device=device)
            products = torch.full((m, p, d), torch.nan, device=device) if method == "direct" and tokens != 100 else None
            per_sample.linear_square_norms_(norms, a, g, products, bias=bias, method=method, precision=precision)
            exact, a, g = torch.zeros(m, dtype=torch.float64), a.cpu(), g.cpu()
            kept = torch.empty(m, p, d, dtype=torch.float64)
            reference.linear_square_norms_(exact, a.double(), g.double(), kept, bias=bias)
            bound = linear_bound(a, g, method, precision, bias=bias)
            assert ((norms.cpu() - 2.0 - exact).abs() <= bound + 1e-14 * exact).all(), (m, tokens, d, p, bias)
            if products is not None:
                rounding = {"ieee": 0.0, "tf32": 2.0**-10, "bf16": 2.0**-8}[precision]
                relative = 1.1 * rounding * sum(x.dtype is torch.float32 for x in (a, g)) + (tokens + 2) * 2.0**-24
                assert ((products.cpu().double() - kept).abs() <= relative * (g.double().mT.abs() @ a.double().abs())).all()


def check_conv(_: str, device: str) -> None:
    x, g = random((4, 4, 9, 8), torch.float32, device), random((4, 6, 9, 8), torch.float32, device)
    how: dict[str, Any] = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 2}
    norms, exact = torch.zeros(2, dtype=torch.float64, device=device), torch.zeros(2, dtype=torch.float64)
    per_sample.conv_square_norms_(norms, x, g, **how)
    reference.conv_square_norms_(exact, x.cpu().double(), g.cpu().double(), **how)
    torch.testing.assert_close(norms.cpu(), exact, rtol=1e-5, atol=0.0)


def check_affine(option: str, device: str) -> None:
    shapes = [(2, 70, 33, 1), (2, 3, 5, 49), (3, 16, 128, 1), *([(1, 20_000, 768, 1), (8, 4, 64, 3136)] if IS_DEVICE else [])]
    for shape in shapes:
        x, g = (random(shape, dtype, device) for dtype in DTYPES[option])
        found = torch.full((2, shape[0], shape[2]), torch.nan, device=device)
        per_sample.affine_grads_(found[0], found[1], x, g)
        x, g = x.cpu().double(), g.cpu().double()
        exact = torch.stack([(x * g).sum((1, 3)), g.sum((1, 3))])
        largest = torch.stack([(x * g).abs().sum((1, 3)), g.abs().sum((1, 3))])
        assert ((found.cpu().double() - exact).abs() <= (shape[1] * shape[3] + 2) * 2.0**-24 * largest).all(), shape


def check_embedding(option: str, device: str) -> None:
    for tokens, dim, vocabulary in ((1, 5, 3), (40, 33, 5), (33, 1040, 1000), *([(700, 768, 50), (512, 64, 1)] if IS_DEVICE else [])):
        for padding in (None, 1):
            ids, g = torch.randint(0, vocabulary, (3, tokens)), random((3, tokens, dim), DTYPES[option][1], device)
            norms = torch.zeros(3, dtype=torch.float64, device=device)
            per_sample.embedding_square_norms_(norms, ids.to(device), g, padding_idx=padding)
            exact, largest = torch.zeros(2, 3, dtype=torch.float64)
            g = g.cpu().double()
            reference.embedding_square_norms_(exact, ids, g, padding_idx=padding)
            reference.embedding_square_norms_(largest, ids, g.abs())
            assert ((norms.cpu() - exact).abs() <= 1.1 * (2 * tokens + 64) * 2.0**-24 * largest).all(), (tokens, dim)


CHECKS: dict[str, Callable[[str, str], None]] = {
    "linear_square_norms_": check_linear,
    "conv_square_norms_": check_conv,
    "affine_grads_": check_affine,
    "embedding_square_norms_": check_embedding,
}


@pytest.mark.parametrize("backend_name", ["triton", "foreach"])
@pytest.mark.parametrize(("op", "option"), [(op, option) for op, options in OPTIONS.items() for option in options])
def test_matches_the_reference(op: str, option: str, backend_name: str, device: str) -> None:
    """The benchmark measures what is green here."""
    if backend_name == "triton" and (reason := reason_without("triton")) is not None:
        pytest.skip(f"backend triton: {reason}")
    with use_backend(backend_name):
        CHECKS[op](option, device)


@pytest.mark.only_cuda
def test_triton_is_chosen_and_native_says_that_it_has_none() -> None:
    if (reason := reason_without("triton")) is not None:
        pytest.skip(f"backend triton: {reason}")
    assert _dispatch.select_per_sample("cuda", frozenset([torch.float32])).__name__ == "sam_kernels.backends.triton.per_sample"
    assert _dispatch.select_per_sample("cuda", frozenset([torch.float64])).__name__ == "sam_kernels.backends.foreach.per_sample"
    if reason_without("native") is None:
        with use_backend("native"), pytest.raises(RuntimeError, match="no gradient norms per sample"):
            _dispatch.select_per_sample("cuda", frozenset([torch.float32]))


def calls(device: str) -> Iterator[tuple[Tensor, Callable[[], None]]]:
    """What is written, and a call that adds to it or writes it."""
    norms = torch.zeros(4, dtype=torch.float64, device=device)
    for tokens in (1, 70):
        a, g = torch.randn(4, tokens, 96, device=device), torch.randn(4, tokens, 64, device=device)
        for method in ("gram", "direct"):
            for bias in (False, True):
                how = {"bias": bias, "method": method, "precision": "tf32"}
                yield norms, lambda a=a, g=g, how=how: per_sample.linear_square_norms_(norms, a, g, **how)
    sums, x = torch.zeros(2, 4, 33, device=device), torch.randn(4, 600, 33, 1, device=device)
    yield sums, lambda: per_sample.affine_grads_(sums[0], sums[1], x, x)
    ids, rows = torch.randint(0, 9, (4, 50), device=device), torch.randn(4, 50, 96, device=device)
    yield norms, lambda: per_sample.embedding_square_norms_(norms, ids, rows, padding_idx=3)


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def triton() -> Iterator[None]:
    if (reason := reason_without("triton")) is not None:
        pytest.skip(f"backend triton: {reason}")
    with use_backend("triton"):
        yield


@pytest.mark.usefixtures("triton")
def test_the_same_bits_every_time(device: str) -> None:
    for written, call in calls(device):
        found = []
        for _ in range(3):
            written.zero_()
            call()
            found.append(written.clone())
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.only_cuda
@pytest.mark.usefixtures("triton")
def test_nothing_waits_and_a_graph_repeats_it(device: str) -> None:
    for written, call in calls(device):
        call()
        written.zero_()
        torch.cuda.synchronize()
        with no_waiting():
            call()
        expected = written.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        for _ in range(2):
            written.zero_()
            graph.replay()
            assert torch.equal(written, expected)


@pytest.mark.only_cuda
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("tokens", [1, 2])
def test_more_groups_than_one_dimension_of_a_grid_has(tokens: int, device: str) -> None:
    a, g = torch.ones(70_000, tokens, 16, device=device), torch.ones(70_000, tokens, 3, device=device)
    norms = torch.zeros(70_000, dtype=torch.float64, device=device)
    per_sample.linear_square_norms_(norms, a, g, method="gram")
    assert torch.equal(norms, torch.full_like(norms, 48.0 * tokens * tokens))
    per_sample.linear_square_norms_(norms.zero_(), a, g, bias=True, method="gram")
    assert torch.equal(norms, torch.full_like(norms, 51.0 * tokens * tokens))


@pytest.mark.only_cuda
@pytest.mark.usefixtures("triton")
def test_no_gradient_is_formed(device: str) -> None:
    """The peak of memory stays below one (p, d) gradient."""
    a, g = torch.randn(4, 64, 1024, device=device), torch.randn(4, 64, 2048, device=device)
    norms = torch.zeros(4, dtype=torch.float64, device=device)
    for method in ("gram", "direct"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        per_sample.linear_square_norms_(norms, a, g, method=method)
        assert torch.cuda.max_memory_allocated() - before < 1024 * 2048 * 4 / 16
