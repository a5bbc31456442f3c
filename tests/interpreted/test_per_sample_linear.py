"""Triton's kernels of linear layers per sample, interpreted: every tile, both forms, every rounding, beside float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sam_kernels import use_backend
from sam_kernels.backends.triton.per_sample import _config
from sam_kernels.functional import per_sample
from sam_kernels.reference import per_sample as reference
from tests.helpers.per_sample_bounds import linear_bound

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F16)]
# Positions, d, p: one position, borders of tiles and steps (16, 32, 64) and one beside them, features fewer than a tile and more.
SIZES = [(1, 7, 40), (2, 16, 17), (15, 33, 5), (16, 16, 16), (17, 31, 65), (33, 1, 64), (65, 63, 3), (129, 20, 18)]


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with use_backend("triton"):
        yield


def surrounded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random numbers between NaN: whoever reads too much gets these."""
    around = torch.full((shape[0] + 2, *shape[1:]), torch.nan, dtype=dtype)
    around[1:-1] = torch.randn(shape).to(dtype)
    return around[1:-1]


def check(a: Tensor, g: Tensor, method: str, precision: str, *, with_products: bool = False, bias: bool = False) -> None:
    m, d, p = a.shape[0], a.shape[2], g.shape[2]
    norms, products = torch.full((m + 2,), 3.0, dtype=torch.float64), torch.full((m + 2, p, d), torch.nan)
    given = products[1:-1] if with_products else None
    per_sample.linear_square_norms_(norms[1:-1], a, g, given, bias=bias, method=method, precision=precision)
    expected, grads = torch.zeros(m, dtype=torch.float64), torch.zeros(m, p, d, dtype=torch.float64)
    reference.linear_square_norms_(expected, a.double(), g.double(), grads, bias=bias)
    bound = linear_bound(a, g, method, precision, bias=bias)
    assert ((norms[1:-1] - 3.0 - expected).abs() <= bound + 1e-15 * expected).all(), (norms[1:-1] - 3.0 - expected, bound)
    assert norms[0] == norms[-1] == 3.0
    assert products[0].isnan().all()
    assert products[-1].isnan().all()
    if with_products:
        rounding = sum(torch.finfo(BF16).eps / 2 * (precision == "bf16") for x in (a, g) if x.dtype is F32)
        allowed = (g.double().mT.abs() @ a.double().abs()) * (1.1 * rounding + (a.shape[1] + 2) * 2.0**-24)
        assert ((products[1:-1].double() - grads).abs() <= allowed).all()


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}".replace("torch.", ""))
@pytest.mark.parametrize("method", ["gram", "direct"])
def test_every_size_is_within_its_bound(method: str, dtypes: tuple[torch.dtype, torch.dtype], precision: str) -> None:
    for tokens, d, p in SIZES if dtypes[0] is F32 or precision == "ieee" else SIZES[3:5]:
        a, g = surrounded((2, tokens, d), dtypes[0]), surrounded((2, tokens, p), dtypes[1])
        check(a, g, method, precision, with_products=method == "direct" and tokens != 65)


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}".replace("torch.", ""))
def test_a_bias_at_every_size(dtypes: tuple[torch.dtype, torch.dtype], precision: str) -> None:
    """Inputs that are small beside the 1 that stands for the bias, or what it adds would be lost in the bound."""
    for tokens, d, p in SIZES if dtypes[0] is F32 or precision == "ieee" else SIZES[3:5]:
        a, g = surrounded((2, tokens, d), dtypes[0]).mul_(0.1), surrounded((2, tokens, p), dtypes[1])
        check(a, g, "gram", precision, bias=True)
        if tokens in (1, 17):
            check(a, g, "direct", precision, bias=True)


def test_a_bias_is_a_feature_that_is_1() -> None:
    """Small integers, of which every sum is exact: bit for bit, at the borders of tiles, where rows past the last have a bias too."""
    for tokens, d, p in SIZES:
        a, g = torch.randint(-2, 3, (3, tokens, d)).to(BF16), torch.randint(-2, 3, (3, tokens, p)).to(F16)
        found, expected = torch.zeros(2, 3, dtype=torch.float64)
        per_sample.linear_square_norms_(found, a, g, bias=True, method="gram")
        per_sample.linear_square_norms_(expected, torch.cat([a, torch.ones_like(a[..., :1])], 2), g, method="gram")
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("method", "precision"), list(itertools.product(["gram", "direct"], ["ieee", "bf16"])))
def test_the_largest_tiles(method: str, precision: str) -> None:
    """Which otherwise take more programs than anyone wants to interpret."""
    largest = _config.TILES[method][precision][0]
    shapes = [(127, 129, 40), (129, 40, 131)] if method == "gram" else [(20, 129, 127), (17, 300, 128)]
    for tokens, d, p in shapes:
        a, g = surrounded((2, tokens, d), F32), surrounded((2, tokens, p), F32)
        with _config.tuned(method, precision, largest):
            check(a, g, method, precision, with_products=method == "direct")
            if method == "gram":
                check(a, g, method, precision, bias=True)


def test_a_micro_batch_is_a_longer_sequence() -> None:
    a, g = torch.randn(6, 5, 20), torch.randn(6, 5, 12)
    check(a.reshape(2, 15, 20), g.reshape(2, 15, 12), "auto", "ieee")


@pytest.mark.parametrize("method", ["gram", "direct"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_bad_group_spoils_no_other(tokens: int, method: str) -> None:
    a, g = torch.randn(3, tokens, 18), torch.randn(3, tokens, 33)
    clean, norms = torch.zeros(2, 3, dtype=torch.float64)
    per_sample.linear_square_norms_(clean, a, g, method=method)
    a[1, -1, -1] = torch.nan
    per_sample.linear_square_norms_(norms, a, g, method=method)
    assert norms.isnan().tolist() == [False, True, False]
    assert torch.equal(norms[::2], clean[::2])


def test_no_group_is_no_work() -> None:
    per_sample.linear_square_norms_(torch.zeros(0, dtype=torch.float64), torch.zeros(0, 4, 3), torch.zeros(0, 4, 2))


def test_float64_has_no_kernels() -> None:
    with pytest.raises(TypeError, match="no kernels for float64"):
        per_sample.linear_square_norms_(torch.zeros(1, dtype=torch.float64), torch.zeros(1, 2, 3).double(), torch.zeros(1, 2, 3))


@pytest.mark.parametrize("groups", [1, 8, 300])
@pytest.mark.parametrize("kind", _config.KINDS)
def test_a_tile_is_what_a_device_takes(kind: str, groups: int) -> None:
    """Powers of two from 16 on; buffers of an operand pair that fit 99 KB; no narrower than what a step of 128 bytes allows."""
    for itemsize, tokens, size in itertools.product((2, 4), (2, 16, 63, 129, 2048), (1, 27, 768, 4096)):
        if (itemsize == 2) != (kind in ("bf16", "fp16")) and not (kind == "bf16" and itemsize == 4):
            continue
        gram = _config.gram_tile(kind, groups, tokens, size, itemsize)
        direct = _config.direct_tile(kind, groups, tokens, size, 768, itemsize)
        for tile in (gram, direct):
            sizes = tile.rows, tile.columns, tile.depth
            assert all(n >= 16 and n & (n - 1) == 0 for n in sizes)
            assert (tile.rows + tile.columns) * tile.depth * itemsize * tile.num_stages <= 99 * 1024
        assert gram.rows == gram.columns


def test_the_method_is_the_one_with_fewer_flops() -> None:
    assert per_sample.linear_method(64, 768, 768) == "gram"
    assert per_sample.linear_method(2048, 768, 768) == "direct"
    assert per_sample.linear_method(1024, 64, 10) == "direct"
    assert per_sample.linear_method(1, 3, 2) == "gram"


def test_a_sweep_of_tiles_leaves_them_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu import sweep_products
    from bench.gpu.gate import Gate
    from bench.gpu.timing import HostClock

    before = copy.deepcopy(_config.TILES)
    monkeypatch.setattr(sweep_products, "WARPS", (4,))
    rows = list(sweep_products.run(HostClock(), "cpu", Gate("", is_off=True), 1e18))
    assert before == _config.TILES
    assert {(row["kernel"], row["dtype"]) for row in rows} == {
        (form, kind) for form in ("gram", "direct") for kind in ("bf16", "tf32", "ieee")
    }
    assert all(any(row["is_default"] for row in rows if row["kernel"] == form) for form in ("gram", "direct"))
