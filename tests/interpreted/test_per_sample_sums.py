"""Triton's kernels of scales, shifts and embeddings per sample, interpreted, beside float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sam_kernels import use_backend
from sam_kernels.backends.triton.per_sample import affine
from sam_kernels.functional import per_sample
from sam_kernels.reference import per_sample as reference
from tests.interpreted.test_per_sample_linear import BF16, F16, F32, surrounded

DTYPES = [(F32, F32), (BF16, BF16), (F16, F32)]
# (M, S, C, L): channels innermost, fewer than a block of 128, as many, more; rows shorter than a block, as long, longer; several parts.
SHAPES = [(2, 1, 3, 1), (2, 9, 128, 1), (1, 200, 129, 1), (2, 3, 5, 49), (1, 2, 3, 513), (1, 70, 2, 16)]


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with use_backend("triton"):
        yield


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}".replace("torch.", ""))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_affine_grads(shape: tuple[int, int, int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, g = (surrounded(shape, dtype) for dtype in dtypes)
    m, s, c, length = shape
    both = torch.full((2, m + 2, c), torch.nan)
    weight, bias = both[0, 1:-1], both[1, 1:-1]
    exact = torch.empty(2, m, c, dtype=torch.float64)
    reference.affine_grads_(exact[0], exact[1], x.double(), g.double())
    roundings = (s * length + 2) * 2.0**-24  # of a sum of so many terms, in whatever order
    largest = [roundings * (x.double() * g.double()).abs().sum((1, 3)), roundings * g.double().abs().sum((1, 3))]
    for given in ((weight, bias), (weight, None), (None, bias)):
        both.fill_(torch.nan)
        per_sample.affine_grads_(*given, None if given[0] is None else x, g)
        for found, expected, bound in zip(given, exact, largest, strict=True):
            if found is not None:
                assert ((found.double() - expected).abs() <= bound).all()
        assert both[:, [0, -1]].isnan().all()


def test_long_sums_are_split_and_put_together() -> None:
    assert affine._split(programs=1, steps=4) == (1, 4)
    for programs, steps in ((1, 13), (7, 10_000), (5000, 100)):
        parts, each = affine._split(programs, steps)
        assert (parts - 1) * each < steps <= parts * each
        assert each >= affine._STEPS or parts == 1
    assert affine._split(1, 10_000)[0] > 500


def test_a_bad_group_spoils_no_other() -> None:
    g = torch.randn(3, 40, 5, 1)
    g[1, 7, 2] = torch.nan
    bias = torch.zeros(3, 5)
    per_sample.affine_grads_(None, bias, None, g)
    assert bias.isnan().nonzero().tolist() == [[1, 2]]
    norms = torch.zeros(3, dtype=torch.float64)
    per_sample.embedding_square_norms_(norms, torch.randint(0, 4, (3, 40)), g.view(3, 40, 5))
    assert norms.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("padding_idx", [None, 1])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_embeddings(dtype: torch.dtype, padding_idx: int | None) -> None:
    """No index twice, each often, one alone; runs that end at a step of four rows and beside it; fewer columns than a block, and more."""
    for tokens, dim, vocabulary in ((1, 3, 5), (16, 33, 1000), (37, 16, 3), (21, 1025, 2), (9, 8, 1)):
        ids = torch.randint(0, vocabulary, (2, tokens), dtype=torch.int32 if tokens == 37 else torch.int64)
        g = surrounded((2, tokens, dim), dtype)
        norms, exact = torch.full((2, 4), 3.0, dtype=torch.float64)
        per_sample.embedding_square_norms_(norms[1:-1], ids, g, padding_idx=padding_idx)
        reference.embedding_square_norms_(exact[1:-1], ids.long(), g.double(), padding_idx=padding_idx)
        largest, nothing = torch.zeros(2, dtype=torch.float64), None
        reference.embedding_square_norms_(largest, ids.long(), g.double().abs(), padding_idx=nothing)
        assert ((norms - exact)[1:-1].abs() <= 1.1 * (2 * tokens + 64) * 2.0**-24 * largest).all()
        assert norms[0] == norms[-1] == 3.0


def test_convolutions_are_unfolded_into_linear_layers() -> None:
    x, g = torch.randn(4, 4, 6, 5), torch.randn(4, 6, 6, 5)
    how = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 2}
    norms, exact = torch.zeros(2, 2, dtype=torch.float64)
    per_sample.conv_square_norms_(norms, x, g, **how)
    reference.conv_square_norms_(exact, x.double(), g.double(), **how)
    torch.testing.assert_close(norms, exact, rtol=1e-5, atol=0.0)
